"""Shared noise through all parts of FLARE's shims in one process: admission, executor, gate, workflow, ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from histoflare.bags.cohort import load_cohort
from histoflare.flare import capabilities
from histoflare.flare import executor as executor_module
from histoflare.flare.admission import Admission
from histoflare.flare.executor import SiteExecutor
from histoflare.flare.gate import Gate
from histoflare.flare.job import read_job
from histoflare.flare.job_files import CONFIG_FOLDER
from histoflare.flare.job_variant import write_variant
from histoflare.flare.kit_signature import sign_kit
from histoflare.flare.site_policy import policy_file, write_first_policy
from histoflare.privacy.own_policy_edit import pin_sites
from histoflare.privacy.policy import POLICIES
from histoflare.privacy.protocol import PROTOCOL_FILE, write_protocols
from histoflare.rounds.runner import run_in_process
from histoflare.rounds.state import hash_state
from histoflare.site.ledgers import on_workstation
from histoflare.site.site_file import SITE_FILE, write_site_file
from histoflare.site.work import SiteWork
from histoflare.slides.manifest import read_manifest

from .bags_on_disk import write_site
from .certified import Consortium
from .stand_in import StandInEngine
from .test_secure_sum import SHARED, SMALL
