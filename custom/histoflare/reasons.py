"""The fixed reason codes: what each means, and what can be done about it.

A code is all that leaves a site of an error's cause (``HistoflareError.reason``); a gate lets no other text
out as the reason of a refusal. The sentences are for people who did not write them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """What stands behind a code.

    Attributes:
        words: What it means, in a sentence; it holds no names, numbers or paths.
        lead: What a consortium's lead can do about it; "" if that is up to the site alone.
        site: What a site's own people can do about it; "" where the error's own text says it.
    """

    words: str
    lead: str = ""
    site: str = ""


TAKES_PART = (
    "What this site takes part in stands in its own local/policy.toml; 'histoflare policy show' shows it, "
    "and 'histoflare policy set' changes it."
)
"""For all that stands in a site's own policy."""

REASONS = {
    "ANNOTATION_INVALID": Reason("An annotation file (GeoJSON) of a slide cannot be used."),
    "BAGS_BUSY": Reason("Another program was writing the site's bags at that moment."),
    "BAG_CHANGED": Reason("A bag was changed while it was in use."),
    "BAG_DAMAGED": Reason("A bag file is damaged."),
    "BAG_EMPTY": Reason("A slide gave no usable patch."),
    "BAG_FOREIGN": Reason("A file in the folder of bags is not a bag."),
    "BAG_MISSING": Reason("A slide's bag is missing: the slides were not prepared, or not all of them."),
    "BAG_NOT_FINITE": Reason("A slide's features hold numbers that are not finite."),
    "BAG_NOT_WRITTEN": Reason("Bags could not be written: the disk is full or the folder is closed."),
    "BAG_SHAPE": Reason("A slide's features do not have the shape they should have."),
    "BAG_UNUSABLE": Reason("A bag cannot be used."),
    "BAG_VERSION": Reason("A bag was made by another version of histoflare."),
    "BUDGET_EXHAUSTED": Reason(
        "The site's privacy budget does not suffice for the job; nothing was trained there.",
        lead=(
            "The job costs more than a patient there has left. Make one that costs less ('histoflare job "
            "make JOB --set privacy.budget_share=… --out NEW'; more noise or fewer rounds), or leave the "
            "site out ('--sites')."
        ),
        site=(
            "'histoflare privacy plan JOB --site local/histoflare.toml' says what a job would cost and what "
            "is left; 'histoflare ledger close RUN --site local/histoflare.toml' gives back what a run that "
            "will not go on has reserved."
        ),
    ),
    "CHECKPOINT_INVALID": Reason("A pretrained checkpoint is not of the network it should be of."),
    "CHECKPOINT_MISSING": Reason("A pretrained checkpoint is missing."),
    "COHORT_INVALID": Reason(
        "The site's data do not fit its manifest or the job (missing, or made in another way).",
        lead=(
            "What does not fit stands in the site's own log. If it is encoder, patch size or labels, submit "
            "a job that fits: on one workstation 'histoflare poc start --sites …' makes it and shows its "
            "command."
        ),
        site=(
            "Check the data: 'histoflare manifest check MANIFEST' and 'histoflare bags show BAGS', or "
            "'histoflare masks check IMAGES --labels LABELS'; bags of another kind are made anew by "
            "'histoflare prepare'."
        ),
    ),
    "ENCODER_BATCH": Reason("The encoder's answer depends on which patches it sees together."),
    "ENCODER_HASH": Reason("The encoder's weight file is not the agreed one."),
    "ENCODER_INPUT": Reason("The encoder does not take patches of this size."),
    "ENCODER_MEMORY": Reason("There was not enough memory for the encoder."),
    "ENCODER_MISMATCH": Reason("The site's bags were made with another encoder than the job's."),
    "ENCODER_NAME": Reason("The encoder's name cannot be used."),
    "ENCODER_NOT_FINITE": Reason("The encoder gave numbers that are not finite."),
    "ENCODER_OUTPUT": Reason("The encoder does not give the features it should."),
    "ENCODER_PREPROCESSING": Reason(
        "Nothing says the mean, std and input size that the encoder was trained with.",
    ),
    "ENCODER_UNKNOWN": Reason("The site does not have the encoder that the job asks for."),
    "ENCODER_UNUSABLE": Reason("The encoder cannot be used."),
    "ENCODER_WEIGHTS": Reason("The encoder's weight file cannot be read."),
    "ENCODER_WEIGHTS_MISSING": Reason("The encoder's weight file is missing at the site."),
    "ERROR": Reason("The site could not do it; the cause is in the site's own log."),
    "EVALUATED_ALREADY": Reason("The site had answered this evaluation before; it answers once."),
    "EVALUATIONS_EXHAUSTED": Reason(
        "The site's policy lets no further evaluation on these patients out.",
        lead=(
            "Ask less often: train without the question at the end ('histoflare job make JOB --set "
            "evaluate=false --out NEW'), or ask about the model without the site ('--sites' of an "
            "evaluation)."
        ),
    ),
    "EVALUATION_NOT_ALLOWED": Reason(
        "The site's policy lets no evaluation out.",
        lead=(
            "Train without the question at the end ('histoflare job make JOB --set evaluate=false --out "
            "NEW'), or ask about the model without the site ('--sites' of an evaluation)."
        ),
    ),
    "EVALUATION_ONLY": Reason(
        "The site tests models and does not train them. This is its own setting.",
        lead=(
            "List it, with evaluate = true, under evaluation_only in the job's job.toml: it is then asked "
            "about the model at the end, and in no round."
        ),
        site="Nothing, if that is meant; else set evaluation_only = false in local/histoflare.toml.",
    ),
    "FEATURES_AMBIGUOUS": Reason("A slide has several imported feature files."),
    "FEATURES_DAMAGED": Reason("An imported feature file is damaged."),
    "FEATURES_ENCODER": Reason("Imported features do not say which encoder made them, or another one did."),
    "FEATURES_MISSING": Reason("A slide has no imported feature file."),
    "FEATURES_SHAPE": Reason("Imported features do not have the shape they should have."),
    "FEATURES_UNIT": Reason("Imported features do not say in which unit their coordinates are."),
    "FEDERATION_FAILED": Reason("The federation could not be started."),
    "FEDERATION_RUNNING": Reason("A federation was running already."),
    "FEDERATION_STOPPED": Reason("The federation was stopped."),
    "FLARE_CHANGED": Reason("Another version of FLARE is installed than this package is made for."),
    "IMAGE_MISSING": Reason("An image of the site's list is missing."),
    "IMAGE_TOO_SMALL": Reason("An image is smaller than the job's window."),
    "IMAGE_UNREADABLE": Reason("An image is damaged or of an unknown kind."),
    "JOB_FAILED": Reason("The job ended with an error."),
    "JOB_INVALID": Reason(
        "The job is configured wrongly.",
        lead=(
            "Make the job from one that came with this version; 'histoflare job show JOB' says what is "
            "wrong with it."
        ),
        site="Nothing here: tell the lead what stands before this.",
    ),
    "JOB_REFUSED": Reason("The job was refused."),
    "JOB_SHARE_EXCEEDED": Reason(
        "The job takes more of the privacy budget than the site's policy lets one job.",
        lead=(
            "Make a job that takes less ('histoflare job make JOB --set privacy.budget_share=… --out NEW'); "
            "'histoflare privacy plan JOB' says what it takes and what the policy lets one job."
        ),
        site=(
            "Nothing here, if one job is to take no more; 'histoflare policy show' says how much it may "
            "take. If this site's ε is below the job's budget_epsilon, tell the lead: the job takes a larger "
            "share here than its budget_share."
        ),
    ),
    "JOB_VERSION": Reason(
        "The job is of another version of histoflare than the site has.",
        lead=(
            "Take the job that came with the version of histoflare that the site has, or have the site "
            "install yours."
        ),
        site=(
            "Install the version of histoflare that the job is of ('histoflare --version' prints the one "
            "that is here), or tell the lead which one is here."
        ),
    ),
    "KIT_CHANGED": Reason(
        "A file of the site's startup kit is not as it was signed, so the site takes no job.",
        site=(
            "In the kit's folder 'histoflare kit check .' lists the files; take the changes back, or ask "
            "the lead for the kit anew."
        ),
    ),
    "LEAVE_OUT_UNSOUND": Reason(
        "The site's policy leaves patients out of a job unnoticed, and of this job it cannot.",
        lead=(
            "Ask the site's steward. A job whose noise is its own (no noise_seed, no trusted server) and of "
            "patients at one site each can be taken."
        ),
        site=(
            "The log says why. 'histoflare ledger close RUN' closes a run that was reserved twice; "
            "'histoflare policy set exhausted=refuse' has such jobs refused when a patient's budget is used "
            "up."
        ),
    ),
    "LEDGER_DAMAGED": Reason(
        "The site's privacy ledger is damaged; no job until a person has looked at it.",
        site=(
            "'histoflare ledger verify --site local/histoflare.toml' says where; put the latest copy back "
            "and bind it with 'histoflare ledger move --site local/histoflare.toml'."
        ),
    ),
    "LEDGER_FOREIGN": Reason(
        "The privacy ledger that the site's file names is another site's, or a workstation's.",
        site=(
            "Name this site's own ledger and key in local/histoflare.toml; 'histoflare ledger show --site "
            "local/histoflare.toml' says whose this one is."
        ),
    ),
    "LEDGER_FULL": Reason(
        "There is no room at the site to book a release, so nothing was trained there.",
        site="Make room on the disk of the ledger.",
    ),
    "LEDGER_MISSING": Reason(
        "The site has no privacy ledger; its steward makes one, or brings the one it has.",
        site=(
            "Name the ledger that is there in local/histoflare.toml; only if there never was one: "
            "'histoflare ledger create SITE --ledger FILE --key FILE --site local/histoflare.toml'."
        ),
    ),
    "LEDGER_MOVED": Reason(
        "The site's privacy ledger is bound to another place; its steward has to move it.",
        site="If it was moved or restored on purpose: 'histoflare ledger move --site local/histoflare.toml'.",
    ),
    "LEDGER_UNUSABLE": Reason("The site's privacy ledger cannot be used."),
    "LIBRARY_MISSING": Reason(
        "A library that the job needs is not installed there.",
        site="Install all that a hospital needs: pip install 'histoflare[all]', of the same version.",
    ),
    "MANIFEST_INVALID": Reason("The site's list of its data (manifest) has faults."),
    "MANIFEST_UNREADABLE": Reason("The site's list of its data (manifest) is missing or cannot be read."),
    "MASK_CLASS": Reason("A mask holds a class that the job does not know."),
    "MASK_EMPTY": Reason("A mask says nothing: no pixel of it has a class."),
    "MASK_MISSING": Reason("A mask of the site's list is missing."),
    "MASK_SIZE": Reason("A mask has another size than its image."),
    "MASK_UNREADABLE": Reason("A mask is damaged or of an unknown kind."),
    "MASK_UNUSABLE": Reason("An image or its mask cannot be used."),
    "METRIC_NOT_ALLOWED": Reason(
        "The site's policy does not let the figure out that was asked for, or not over so few patients.",
        lead=(
            "Of an evaluation: leave the site out ('--sites'). Of a training: leave best_metric out of "
            "job.toml, and stop.patience out of protocol.toml (another protocol, to be agreed on anew). Or "
            "have the site's policy let the figure out."
        ),
        site=(
            "'histoflare policy show --all' lists the figures that may leave; minimum_patients says of how "
            "many patients of each class."
        ),
    ),
    "MODEL_FILE_INVALID": Reason("A model file does not fit the job."),
    "MODEL_FILE_MISSING": Reason("A model file is missing."),
    "MODEL_NOT_ALLOWED": Reason(
        "The site's own policy does not list the job's model.",
        site=TAKES_PART,
    ),
    "MODEL_NOT_PRIVATE": Reason(
        "The model has layers that mix patients, whose gradients cannot be told apart.",
    ),
    "MOSAIC_FILE": Reason("A stored mosaic cannot be read."),
    "MOSAIC_PARAMETERS": Reason("The settings for cutting patches cannot be used."),
    "NOTHING_TO_EVALUATE": Reason("The site has nothing to test the model on."),
    "NOT_ADMITTED": Reason("The site's admission had not let this job in, so nothing was trained."),
    "NOT_FINITE": Reason("The update held numbers that are not finite: training had diverged."),
    "NOT_RELEASED": Reason("The update did not carry the site's release stamp, so it was not used."),
    "NUMBER_NOT_ALLOWED": Reason(
        "The site's policy does not let a number out that the strategy sends beside an update.",
        lead="Choose another strategy, or have the site's policy list the number.",
        site="'histoflare policy show --all' lists the numbers that may leave.",
    ),
    "OUTPUT_TAKEN": Reason("The output folder held what another run had left."),
    "POLICY_INVALID": Reason(
        "A policy file of the site is missing or wrong; without its policies nothing leaves.",
        site="'histoflare policy check' says all that is wrong.",
    ),
    "PORT_TAKEN": Reason("A network port was taken by another program."),
    "PRIVACY_INVALID": Reason("The job's privacy settings cannot be used."),
    "PRIVACY_MISMATCH": Reason(
        "The job does not protect its updates in the way that the site's policy asks for.",
        lead=(
            "Ask for the scope that goes with the job's mechanism ('histoflare job make JOB --scope … --out "
            "NEW'; 'histoflare job show JOB' prints both)."
        ),
        site="Nothing here: tell the lead which mechanism the policy asks for ('histoflare policy show').",
    ),
    "PROTOCOL_INVALID": Reason("The protocol is incomplete or wrong."),
    "PROTOCOL_MISMATCH": Reason(
        "The job's protocol is not the one that the site had agreed to.",
        lead=(
            "Submit a job with the protocol that the sites agreed to ('histoflare job show JOB' prints its "
            "hash, 'histoflare poc status' the command of the job that fits), or put this one into every "
            "kit."
        ),
        site=(
            "If the consortium agreed on this protocol, the lead has to make a kit with it; if not, nothing "
            "is to be done here."
        ),
    ),
    "PROTOCOL_MISSING": Reason("The site has no protocol that it agreed to."),
    "PURPOSE_NOT_ALLOWED": Reason(
        "The site's own policy does not list the job's purpose.",
        site=TAKES_PART,
    ),
    "RECORDS_INVALID": Reason("The site's own notes of the run cannot be used."),
    "REPLY_CHANGED": Reason("The reply was changed after its release, so the site stopped it."),
    "REPLY_NOT_ALLOWED": Reason("The reply held something that the site's policy does not let out."),
    "RESERVATION_USED_UP": Reason(
        "All rounds that the site had reserved for the job are booked, and its policy books none beyond.",
        lead="Submit the job again, as another run: rounds that were lost or failed are paid for, too.",
    ),
    "RESOLUTION_NOT_NAMED": Reason(
        "The site's images state their µm/px and the protocol names none, so that sites cannot be compared.",
        lead=(
            "Name the resolution that the sites agree on in the protocol ('histoflare job make JOB --set "
            "protocol.mpp=… --out NEW'), and put that protocol into every kit."
        ),
        site="Nothing here: the lead has to name mpp in the job's protocol, as these images are at it.",
    ),
    "RESULTS_BUSY": Reason("Another command was writing the same table of results."),
    "ROLE_CHANGED": Reason(
        "A patient that was for training, validation or testing would be for another of them.",
        site="Put the split of the manifest back as it was when these patients were first used.",
    ),
    "ROUND_INVALID": Reason("The server asked for a round that the agreed protocol does not have."),
    "RUN_INVALID": Reason("The earlier run that this one goes on from cannot be used."),
    "SCOPE_NOT_ALLOWED": Reason(
        "The site's own policy does not list the scope that the job asks for.",
        site=TAKES_PART,
    ),
    "SCOPE_UNKNOWN": Reason("The site has no policy of the name that the job asks for."),
    "SEGMENTATION_BUSY": Reason("Another program was writing the same mask."),
    "SEGMENTATION_CHANGED": Reason("A half-made mask is of another slide, model or setting."),
    "SHARE_INVALID": Reason("The layers to be shared are not layers of the model."),
    "SITES_NOT_NAMED": Reason("A job with a model in it must name its sites."),
    "SITE_HAS_NO_TRAINING_DATA": Reason("The site has nothing to train on."),
    "SITE_NOT_CONFIGURED": Reason(
        "The site has not said where its data are.",
        site="Complete local/histoflare.toml.",
    ),
    "SLIDE_AMBIGUOUS": Reason("A folder holds several slides where one was meant."),
    "SLIDE_DARK_BACKGROUND": Reason("The slide has a dark background, as in fluorescence."),
    "SLIDE_MISSING": Reason("The slide's file is not there."),
    "SLIDE_MPP_INVALID": Reason("The slide's resolution is given wrongly."),
    "SLIDE_MPP_MISSING": Reason("The slide's resolution is not known."),
    "SLIDE_NO_PATCHES": Reason("No patch of the slide holds enough tissue."),
    "SLIDE_NO_TISSUE": Reason("No tissue was found on the slide."),
    "SLIDE_OPEN_FAILED": Reason("The slide cannot be opened; its file is damaged."),
    "SLIDE_READ_FAILED": Reason("The slide opens but cannot be read; its file is damaged."),
    "SLIDE_TOO_COARSE": Reason("The slide's resolution is too coarse for the job."),
    "SLIDE_TOO_SMALL": Reason("The slide is smaller than one patch."),
    "SLIDE_UNSUPPORTED": Reason("The slide's file format is not known."),
    "SLIDE_UNUSABLE": Reason("The slide cannot be used."),
    "STATE_INVALID": Reason("The model that arrived does not fit the job."),
    "STOPPED": Reason("The work was stopped before it was done."),
    "STRATEGY_NOT_ALLOWED": Reason(
        "The site's own policy does not list the job's strategy.",
        site=TAKES_PART,
    ),
    "SUM_LIST_INVALID": Reason(
        "The list of the sites in a secure sum was not the one that they had made; nothing was trained.",
        lead=(
            "Submit the job again. If it comes back, the server hands out another list than the sites sent: "
            "look for who changes it."
        ),
        site=(
            "The job's log says what was wrong with the list. If it is a certificate, compare its "
            "fingerprint with the one that the other hospital's own people tell you."
        ),
    ),
    "SUM_TOO_FEW_KNOWN": Reason(
        "A secure sum had fewer sites than it takes to hide one, counting those alone that the site knows.",
        lead=(
            "Ask more sites, or have the sites pin each other's certificates; with shared noise, a job that "
            "counts on fewer honest sites (privacy.honest) has more noise at each."
        ),
        site=(
            "Pin the certificates of the hospitals that you know: 'histoflare policy pin SITE FINGERPRINT', "
            "with the fingerprint that their own people tell you."
        ),
    ),
    "SUM_VOID": Reason(
        "A secure sum did not open: a site was missing, or the sites were not given the same round.",
        lead=(
            "One missing site voids the whole round. See that all sites are up, or leave one out "
            "('--sites'), and submit the job again."
        ),
    ),
    "TASK_UNEXPECTED": Reason("The site was asked for something that is not of this job."),
    "TOO_FEW_PATIENTS": Reason(
        "The site has fewer patients than its own policy asks for.",
        lead=(
            "Leave the site out ('--sites'). If it said so of the evaluation alone, train without the "
            "question at the end ('histoflare job make JOB --set evaluate=false --out NEW') and ask the "
            "other sites later."
        ),
    ),
    "TRAINER_DIED": Reason(
        "The site's training process ended unexpectedly; it starts anew in the next round.",
        site=(
            "Look in the log before this for what it died of, such as too little memory; it is started anew "
            "by itself in the next round."
        ),
    ),
    "TRAINING_FAILED": Reason(
        "Training failed at the site; the cause is in the site's own log.",
        site="The lines before this in the job's log say of what.",
    ),
    "TRANSPORT_UNFIT": Reason(
        "The strategy needs more than a sum of the updates, and the transport shows the server no more.",
    ),
    "UPDATES_INVALID": Reason("The update was not usable and was left out."),
    "UPDATE_OUT_OF_RANGE": Reason(
        "The update held numbers too large for a secure sum, so it was not sent.",
        lead=(
            "Lower the learning rate, weigh the sites equally ('histoflare job make JOB --set "
            "strategy.weighting=uniform --out NEW'), or use the transport float32."
        ),
    ),
    "WEIGHTS_INVALID": Reason("The sites' weights in the average are wrong."),
    "WEIGHT_NOT_ALLOWED": Reason(
        "The site's policy does not let out how much data stands behind its update.",
        lead=(
            "Weigh the sites equally ('histoflare job make JOB --set strategy.weighting=uniform --out NEW')."
        ),
    ),
}
"""Every reason code there is."""


def explain(code: str) -> str:
    """Return what ``code`` means in plain words; for an unknown one, where to ask."""
    found = REASONS.get(code)
    return "A code this report does not know; ask the site." if found is None else found.words


def advise_lead(code: str) -> str:
    """Return what a lead can do about a refusal with ``code``; empty if that is up to the site alone."""
    return REASONS[code].lead if code in REASONS else ""


def advise_site(code: str) -> str:
    """Return what a site's own people can do about a refusal with ``code``; empty if its error says it."""
    return REASONS[code].site if code in REASONS else ""
