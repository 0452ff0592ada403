"""Resolution rules, on property tables as OpenSlide gives them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoflare.errors import SlideError
from histoflare.slides.resolution import SlideInfo, choose_level, given_mpp_fault, slide_info


def info_of(properties: dict[str, str], given_mpp: float | None = None) -> tuple[SlideInfo, str]:
    return slide_info(properties, [(4000, 2000), (1000, 500)], [1.0, 4.0], given_mpp)


def mpp_properties(x: float, y: float, power: float | None = None, vendor: str = "aperio") -> dict[str, str]:
    properties = {"openslide.vendor": vendor, "openslide.mpp-x": str(x), "openslide.mpp-y": str(y)}
    return properties if power is None else {**properties, "openslide.objective-power": str(power)}


def test_given_wins_over_slide_and_slide_over_objective() -> None:
    both = mpp_properties(0.25, 0.25, power=20)
    assert (info_of(both, 0.3)[0].mpp, info_of(both, 0.3)[0].mpp_source) == (0.3, "given")
    assert (info_of(both)[0].mpp, info_of(both)[0].mpp_source) == (0.25, "slide")
    only_power = {"openslide.objective-power": "20"}
    assert (info_of(only_power)[0].mpp, info_of(only_power)[0].mpp_source) == (0.5, "objective")
    nothing, problem = info_of({})
    assert (nothing.mpp, nothing.mpp_source) == (None, None)
    assert "does not say" in problem


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_printing_resolution_of_a_generic_tiff_counts_as_missing(dpi: float) -> None:
    mpp = 25400 / dpi
    assert info_of(mpp_properties(mpp, mpp, vendor="generic-tiff"))[0].mpp is None
    assert info_of(mpp_properties(mpp, mpp, vendor="dicom"))[0].mpp is None
    with_power = mpp_properties(mpp, mpp, power=40, vendor="generic-tiff")
    assert info_of(with_power)[0].mpp_source == "objective"


@pytest.mark.parametrize(
    ("mpp", "power"),
    [
        (0.2527, 40), (0.2205, 40), (0.2639, 40), (0.4942, 20), (0.5054, 20),  # Aperio, Hamamatsu, GT450
        (0.25, 20), (0.2325, 20), (0.1725, 20), (0.2738, 20),  # doublers, small camera pixels
        (0.0913, 60), (1.0, 10), (2.0, 5), (0.5, None), (0.12, None), (0.25, 40),
        (25.0, None),  # an overview
        (0.055, 100),  # oil immersion
    ],
)  # fmt: skip
def test_what_scanners_state_is_taken(mpp: float, power: float | None) -> None:
    info, problem = info_of(mpp_properties(mpp, mpp, power))
    assert (info.mpp, info.mpp_source, problem) == (mpp, "slide", "")


@pytest.mark.parametrize(
    ("mpp", "power", "says"),
    [
        (0.025, None, "finer than a light microscope"),
        (0.05, None, "finer than a light microscope"),  # 0.5 with px/mm for px/cm
        (0.025, 40, "means about 0.25"),
        (0.04, 40, "finer"),
        (0.5, 40, "objective of 40x"),
        (2.5, 40, "objective of 40x"),
        (5.0, 20, "objective of 20x"),
        (0.05, 20, "finer"),
        (0.25, 400, "objective of 400x"),
        (40.0, None, "coarser than any microscope"),
        (40.0, 40, "means about 0.25"),
        (30.0, None, "120 mm long"),  # of 4000 px
    ],
)
def test_what_no_scanner_can_mean_is_named_and_not_taken(mpp: float, power: float | None, says: str) -> None:
    info, problem = info_of(mpp_properties(mpp, mpp, power))
    assert (info.mpp, info.mpp_source) == (None, None)
    assert {level.mpp for level in info.levels} == {None}
    assert says in problem and f"{mpp:g}" in problem
    insisted, note = info_of(mpp_properties(mpp, mpp, power), 0.3)
    assert (insisted.mpp, insisted.mpp_source) == (0.3, "given")
    assert note == f"the slide itself says {mpp:g} µm/px"


def test_an_objective_that_none_has_says_nothing() -> None:
    for power in ("400", "0.5"):
        info, problem = info_of({"openslide.objective-power": power})
        assert info.mpp is None and f"{power}x" in problem


@pytest.mark.parametrize("mpp", [0.051, 0.0863, 0.25, 0.5, 4.0, 9.9])
def test_a_person_may_state_what_a_microscope_can_have(mpp: float) -> None:
    assert given_mpp_fault(mpp) == ""


@pytest.mark.parametrize("mpp", [10, 20, 40, 63, 1000, 0.05, 0.025, 0.0, -1.0, math.nan, math.inf])
def test_a_magnification_is_no_resolution(mpp: float) -> None:
    fault = given_mpp_fault(mpp)
    assert fault
    assert ("magnification" in fault) == (10 <= mpp <= 1000)


def test_nearly_square_pixels_are_averaged_and_oblong_ones_refused() -> None:
    assert info_of(mpp_properties(0.500, 0.504))[0].mpp == pytest.approx(0.502)
    oblong, problem = info_of(mpp_properties(0.25, 0.5, power=20))
    assert oblong.mpp is None  # not even from the objective power
    assert "not square" in problem


@pytest.mark.parametrize("text", ["nan", "inf", "-0.5", "0", "abc", ""])
def test_nonsense_counts_as_missing(text: str) -> None:
    assert info_of({"openslide.mpp-x": text, "openslide.mpp-y": text})[0].mpp is None


def test_nothing_but_the_allowed_properties_is_kept() -> None:
    secret = "MUSTERMANN"
    properties = {
        **mpp_properties(0.25, 0.25),
        "aperio.Filename": secret,
        "dicom.PatientName": secret,
        "hamamatsu.Barcode": secret,
        "openslide.comment": secret,
    }
    info, problem = info_of(properties)
    assert secret not in str(info.to_json()) + problem
    assert set(info.to_json()) == {
        "vendor",
        "l0_size_px",
        "mpp",
        "mpp_source",
        "objective_power",
        "levels",
        "l0_bounds_px",
    }


def test_bounds_are_four_whole_numbers_or_none() -> None:
    sides = {"x": "-3", "y": "40", "width": "500", "height": "300"}
    assert info_of(bounds_properties(sides))[0].l0_bounds_px == (-3, 40, 500, 300)
    for wrong in ({"x": "3.5"}, {"width": "0"}, {"y": ""}):
        assert info_of(bounds_properties(sides | wrong))[0].l0_bounds_px is None
    del sides["height"]
    assert info_of(bounds_properties(sides))[0].l0_bounds_px is None


def bounds_properties(sides: dict[str, str]) -> dict[str, str]:
    return {f"openslide.bounds-{side}": value for side, value in sides.items()}


@pytest.mark.parametrize(
    ("mpp", "level", "lv_per_px"),
    [
        (0.25, 0, 1.0),
        (0.252, 0, 1.0),  # within 2 %
        (0.5, 0, 2.0),
        (0.505, 0, 2.0),
        (0.6, 0, 2.4),
        (0.99, 1, 1.0),  # level 1 is 1.0: within 2 %, though coarser
        (1.0, 1, 1.0),
        (2.0, 1, 2.0),
        (0.21, 0, 0.84),  # a little upsampling is allowed
    ],
)
def test_level_by_mpp(mpp: float, level: int, lv_per_px: float) -> None:
    info, _ = info_of(mpp_properties(0.25, 0.25))
    assert choose_level(info, 0.25, mpp) == (level, pytest.approx(lv_per_px))


def test_much_finer_than_the_slide_is_refused() -> None:
    info, _ = info_of(mpp_properties(0.25, 0.25))
    with pytest.raises(SlideError) as caught:
        choose_level(info, 0.25, 0.25 / 1.3)
    assert caught.value.reason == "SLIDE_TOO_COARSE"


@given(st.floats(0.1, 50), st.floats(0.2, 64))
def test_span_is_the_wanted_one_within_two_percent(l0_mpp: float, mpp: float) -> None:
    info, _ = info_of({}, l0_mpp)
    if mpp < l0_mpp / 1.25:
        with pytest.raises(SlideError):
            choose_level(info, l0_mpp, mpp)
        return
    level, lv_per_px = choose_level(info, l0_mpp, mpp)
    spanned = l0_mpp * info.levels[level].downsample * lv_per_px
    assert spanned == pytest.approx(mpp, rel=0.0205)
    if level == 0:
        assert mpp < 4 * l0_mpp  # otherwise level 1 is fine enough and cheaper
