"""What the fixed reason codes mean, for people who do not write them."""

from __future__ import annotations

REASONS_IN_WORDS = {
    "ANNOTATION_INVALID": "An annotation file (GeoJSON) of a slide cannot be used.",
    "BAGS_BUSY": "Another program was writing the site's bags at that moment.",
    "BAG_CHANGED": "A bag was changed while it was in use.",
    "BAG_DAMAGED": "A bag file is damaged.",
    "BAG_EMPTY": "A slide gave no usable patch.",
    "BAG_FOREIGN": "A file in the folder of bags is not a bag.",
    "BAG_MISSING": "A slide's bag is missing: the slides were not prepared, or not all of them.",
    "BAG_NOT_FINITE": "A slide's features hold numbers that are not finite.",
    "BAG_NOT_WRITTEN": "Bags could not be written: the disk is full or the folder is closed.",
    "BAG_SHAPE": "A slide's features do not have the shape they should have.",
    "BAG_UNUSABLE": "A bag cannot be used.",
    "BAG_VERSION": "A bag was made by another version of histoflare.",
    "BUDGET_EXHAUSTED": "The site's privacy budget does not suffice for the job; nothing was trained there.",
    "CHECKPOINT_INVALID": "A pretrained checkpoint is not of the network it should be of.",
    "CHECKPOINT_MISSING": "A pretrained checkpoint is missing.",
    "COHORT_INVALID": "The site's data do not fit its manifest or the job (missing, or made in another way).",
    "ENCODER_BATCH": "The encoder's answer depends on which patches it sees together.",
    "ENCODER_HASH": "The encoder's weight file is not the agreed one.",
    "ENCODER_INPUT": "The encoder does not take patches of this size.",
    "ENCODER_MEMORY": "There was not enough memory for the encoder.",
    "ENCODER_MISMATCH": "The site's bags were made with another encoder than the job's.",
    "ENCODER_NAME": "The encoder's name cannot be used.",
    "ENCODER_NOT_FINITE": "The encoder gave numbers that are not finite.",
    "ENCODER_OUTPUT": "The encoder does not give the features it should.",
    "ENCODER_PREPROCESSING": "Nothing says the mean, std and input size that the encoder was trained with.",
    "ENCODER_UNKNOWN": "The site does not have the encoder that the job asks for.",
    "ENCODER_UNUSABLE": "The encoder cannot be used.",
    "ENCODER_WEIGHTS": "The encoder's weight file cannot be read.",
    "ENCODER_WEIGHTS_MISSING": "The encoder's weight file is missing at the site.",
    "ERROR": "The site could not do it; the cause is in the site's own log.",
    "EVALUATED_ALREADY": "The site had answered this evaluation before; it answers once.",
    "EVALUATIONS_EXHAUSTED": "The site's policy lets no further evaluation on these patients out.",
    "EVALUATION_NOT_ALLOWED": "The site's policy lets no evaluation out.",
    "EVALUATION_ONLY": "The site tests models and does not train them. This is its own setting.",
    "FEATURES_AMBIGUOUS": "A slide has several imported feature files.",
    "FEATURES_DAMAGED": "An imported feature file is damaged.",
    "FEATURES_ENCODER": "Imported features do not say which encoder made them, or another one did.",
    "FEATURES_MISSING": "A slide has no imported feature file.",
    "FEATURES_SHAPE": "Imported features do not have the shape they should have.",
    "FEATURES_UNIT": "Imported features do not say in which unit their coordinates are.",
    "FEDERATION_FAILED": "The federation could not be started.",
    "FEDERATION_RUNNING": "A federation was running already.",
    "FEDERATION_STOPPED": "The federation was stopped.",
    "FLARE_CHANGED": "Another version of FLARE is installed than this package is made for.",
    "IMAGE_MISSING": "An image of the site's list is missing.",
    "IMAGE_TOO_SMALL": "An image is smaller than the job's window.",
    "IMAGE_UNREADABLE": "An image is damaged or of an unknown kind.",
    "JOB_FAILED": "The job ended with an error.",
    "JOB_INVALID": "The job is configured wrongly.",
    "JOB_REFUSED": "The job was refused.",
    "JOB_SHARE_EXCEEDED": "The job takes more of the privacy budget than the site's policy lets one job.",
    "JOB_VERSION": "The job is of another version of histoflare than the site has.",
    "KIT_CHANGED": "A file of the site's startup kit is not as it was signed, so the site takes no job.",
    "LEDGER_DAMAGED": "The site's privacy ledger is damaged; no job until a person has looked at it.",
    "LEDGER_FOREIGN": "The privacy ledger that the site's file names is another site's, or a workstation's.",
    "LEDGER_FULL": "There is no room at the site to book a release, so nothing was trained there.",
    "LEDGER_MISSING": "The site has no privacy ledger; its steward makes one, or brings the one it has.",
    "LEDGER_MOVED": "The site's privacy ledger is bound to another place; its steward has to move it.",
    "LEDGER_UNUSABLE": "The site's privacy ledger cannot be used.",
    "MANIFEST_INVALID": "The site's list of its data (manifest) has faults.",
    "MANIFEST_UNREADABLE": "The site's list of its data (manifest) is missing or cannot be read.",
    "MASK_CLASS": "A mask holds a class that the job does not know.",
    "MASK_EMPTY": "A mask says nothing: no pixel of it has a class.",
    "MASK_MISSING": "A mask of the site's list is missing.",
    "MASK_SIZE": "A mask has another size than its image.",
    "MASK_UNREADABLE": "A mask is damaged or of an unknown kind.",
    "MASK_UNUSABLE": "An image or its mask cannot be used.",
    "METRIC_NOT_ALLOWED": "The site's policy does not let the figure out that was asked for.",
    "MODEL_FILE_INVALID": "A model file does not fit the job.",
    "MODEL_FILE_MISSING": "A model file is missing.",
    "MODEL_NOT_ALLOWED": "The site's own policy does not list the job's model.",
    "MODEL_NOT_PRIVATE": "The model has layers that mix patients, whose gradients cannot be told apart.",
    "MOSAIC_FILE": "A stored mosaic cannot be read.",
    "MOSAIC_PARAMETERS": "The settings for cutting patches cannot be used.",
    "NOTHING_TO_EVALUATE": "The site has nothing to test the model on.",
    "NOT_ADMITTED": "The site's admission had not let this job in, so nothing was trained.",
    "NOT_FINITE": "The update held numbers that are not finite: training had diverged.",
    "NOT_RELEASED": "The update did not carry the site's release stamp, so it was not used.",
    "POLICY_INVALID": "A policy file of the site is missing or wrong; without its policies nothing leaves.",
    "OUTPUT_TAKEN": "The output folder held what another run had left.",
    "PORT_TAKEN": "A network port was taken by another program.",
    "PRIVACY_INVALID": "The job's privacy settings cannot be used.",
    "PRIVACY_MISMATCH": "The job does not protect its updates in the way that the site's policy asks for.",
    "PROTOCOL_INVALID": "The protocol is incomplete or wrong.",
    "PROTOCOL_MISMATCH": "The job's protocol is not the one that the site had agreed to.",
    "PROTOCOL_MISSING": "The site has no protocol that it agreed to.",
    "PURPOSE_NOT_ALLOWED": "The site's own policy does not list the job's purpose.",
    "RECORDS_INVALID": "The site's own notes of the run cannot be used.",
    "REPLY_CHANGED": "The reply was changed after its release, so the site stopped it.",
    "REPLY_NOT_ALLOWED": "The reply held something that the site's policy does not let out.",
    "RESOLUTION_NOT_NAMED": "The site's images state their µm/px and the protocol names none, so that sites "
    "cannot be compared.",
    "RESULTS_BUSY": "Another command was writing the same table of results.",
    "ROLE_CHANGED": "A patient that was for training, validation or testing would be for another of them.",
    "ROUND_INVALID": "The server asked for a round that the agreed protocol does not have.",
    "RUN_INVALID": "The earlier run that this one goes on from cannot be used.",
    "SCOPE_NOT_ALLOWED": "The site's own policy does not list the scope that the job asks for.",
    "SCOPE_UNKNOWN": "The site has no policy of the name that the job asks for.",
    "SEGMENTATION_BUSY": "Another program was writing the same mask.",
    "SEGMENTATION_CHANGED": "A half-made mask is of another slide, model or setting.",
    "SHARE_INVALID": "The layers to be shared are not layers of the model.",
    "SITES_NOT_NAMED": "A job with a model in it must name its sites.",
    "SITE_HAS_NO_TRAINING_DATA": "The site has nothing to train on.",
    "SITE_NOT_CONFIGURED": "The site has not said where its data are.",
    "SLIDE_AMBIGUOUS": "A folder holds several slides where one was meant.",
    "SLIDE_DARK_BACKGROUND": "The slide has a dark background, as in fluorescence.",
    "SLIDE_MISSING": "The slide's file is not there.",
    "SLIDE_MPP_INVALID": "The slide's resolution is given wrongly.",
    "SLIDE_MPP_MISSING": "The slide's resolution is not known.",
    "SLIDE_NO_PATCHES": "No patch of the slide holds enough tissue.",
    "SLIDE_NO_TISSUE": "No tissue was found on the slide.",
    "SLIDE_OPEN_FAILED": "The slide cannot be opened; its file is damaged.",
    "SLIDE_READ_FAILED": "The slide opens but cannot be read; its file is damaged.",
    "SLIDE_TOO_COARSE": "The slide's resolution is too coarse for the job.",
    "SLIDE_TOO_SMALL": "The slide is smaller than one patch.",
    "SLIDE_UNSUPPORTED": "The slide's file format is not known.",
    "SLIDE_UNUSABLE": "The slide cannot be used.",
    "STATE_INVALID": "The model that arrived does not fit the job.",
    "STOPPED": "The work was stopped before it was done.",
    "STRATEGY_NOT_ALLOWED": "The site's own policy does not list the job's strategy.",
    "TASK_UNEXPECTED": "The site was asked for something that is not of this job.",
    "TOO_FEW_PATIENTS": "The site has fewer patients than its own policy asks for.",
    "TRAINER_DIED": "The site's training process ended unexpectedly; it starts anew in the next round.",
    "TRAINING_FAILED": "Training failed at the site; the cause is in the site's own log.",
    "TRANSPORT_UNFIT": "The strategy needs each update, and the transport shows the server only their sum.",
    "UPDATES_INVALID": "The update was not usable and was left out.",
    "WEIGHTS_INVALID": "The sites' weights in the average are wrong.",
    "WEIGHT_NOT_ALLOWED": "The site's policy does not let out how much data stands behind its update.",
}
"""One sentence for every code of :data:`histoflare.errors.REASONS`."""


ADVICE = {
    "BUDGET_EXHAUSTED": (
        "The job costs more than a patient there has left. Make one that costs less ('histoflare job "
        "make JOB --set privacy.budget_share=… --out NEW'; more noise or fewer rounds), or leave "
        "the site out ('--sites')."
    ),
    "COHORT_INVALID": (
        "What does not fit stands in the site's own log. If it is encoder, patch size or labels, "
        "submit a job that fits: on one workstation 'histoflare poc start --sites …' makes it and "
        "shows its command."
    ),
    "EVALUATIONS_EXHAUSTED": (
        "Ask less often: train without the question at the end ('histoflare job make JOB --set "
        "evaluate=false --out NEW'), or ask about the model without the site ('--sites' of an evaluation)."
    ),
    "EVALUATION_NOT_ALLOWED": (
        "Train without the question at the end ('histoflare job make JOB --set evaluate=false --out NEW'), "
        "or ask about the model without the site ('--sites' of an evaluation)."
    ),
    "EVALUATION_ONLY": (
        "List it, with evaluate = true, under evaluation_only in the job's job.toml: it is then asked"
        " about the model at the end, and in no round."
    ),
    "JOB_INVALID": (
        "Make the job from one that came with this version; 'histoflare job show JOB' says what is "
        "wrong with it."
    ),
    "JOB_VERSION": (
        "Take the job that came with the version of histoflare that the site has, or have the site "
        "install yours."
    ),
    "JOB_SHARE_EXCEEDED": (
        "Make a job that takes less ('histoflare job make JOB --set privacy.budget_share=… --out NEW'); "
        "'histoflare privacy plan JOB' says what it takes and what the policy lets one job."
    ),
    "METRIC_NOT_ALLOWED": (
        "Leave best_metric out of job.toml, and stop.patience out of protocol.toml (another protocol, to be "
        "agreed on anew); or have the site's policy let the figure out."
    ),
    "PRIVACY_MISMATCH": (
        "Ask for the scope that goes with the job's mechanism ('histoflare job make JOB --scope … "
        "--out NEW'; 'histoflare job show JOB' prints both)."
    ),
    "PROTOCOL_MISMATCH": (
        "Submit a job with the protocol that the sites agreed to ('histoflare job show JOB' prints "
        "its hash, 'histoflare poc status' the command of the job that fits), or put this one into "
        "every kit."
    ),
    "RESOLUTION_NOT_NAMED": (
        "Name the resolution that the sites agree on in the protocol ('histoflare job make JOB --set "
        "protocol.mpp=… --out NEW'), and put that protocol into every kit."
    ),
    "TOO_FEW_PATIENTS": (
        "Leave the site out ('--sites'). If it said so of the evaluation alone, train without the question "
        "at the end ('histoflare job make JOB --set evaluate=false --out NEW') and ask the other sites later."
    ),
    "WEIGHT_NOT_ALLOWED": (
        "Weigh the sites equally ('histoflare job make JOB --set strategy.weighting=uniform --out NEW')."
    ),
}
"""What a lead can do about a refusal, where there is something."""

AT_SITE = {
    "BUDGET_EXHAUSTED": (
        "'histoflare privacy plan JOB --site local/histoflare.toml' says what a job would cost and "
        "what is left; 'histoflare ledger close RUN --site local/histoflare.toml' gives back what a "
        "run that will not go on has reserved."
    ),
    "COHORT_INVALID": (
        "Check the data: 'histoflare manifest check MANIFEST' and 'histoflare bags show BAGS', or "
        "'histoflare masks check IMAGES --labels LABELS'; bags of another kind are made anew by "
        "'histoflare prepare'."
    ),
    "EVALUATION_ONLY": (
        "Nothing, if that is meant; else set evaluation_only = false in local/histoflare.toml."
    ),
    "JOB_INVALID": "Nothing here: tell the lead what stands before this.",
    "JOB_VERSION": (
        "Install the version of histoflare that the job is of ('histoflare --version' prints the one "
        "that is here), or tell the lead which one is here."
    ),
    "KIT_CHANGED": (
        "In the kit's folder 'histoflare kit check .' lists the files; take the changes back, or ask "
        "the lead for the kit anew."
    ),
    "JOB_SHARE_EXCEEDED": (
        "Nothing here, if one job is to take no more; 'histoflare policy show' says how much it may take."
    ),
    "LEDGER_DAMAGED": (
        "'histoflare ledger verify --site local/histoflare.toml' says where; put the latest copy back"
        " and bind it with 'histoflare ledger move --site local/histoflare.toml'."
    ),
    "LEDGER_FOREIGN": (
        "Name this site's own ledger and key in local/histoflare.toml; 'histoflare ledger show --site"
        " local/histoflare.toml' says whose this one is."
    ),
    "LEDGER_FULL": "Make room on the disk of the ledger.",
    "LEDGER_MISSING": (
        "Name the ledger that is there in local/histoflare.toml; only if there never was one: "
        "'histoflare ledger create SITE --ledger FILE --key FILE --site local/histoflare.toml'."
    ),
    "LEDGER_MOVED": (
        "If it was moved or restored on purpose: 'histoflare ledger move --site local/histoflare.toml'."
    ),
    "METRIC_NOT_ALLOWED": "'histoflare policy show --all' lists the figures that may leave.",
    "POLICY_INVALID": "'histoflare policy check' says all that is wrong.",
    "PRIVACY_MISMATCH": (
        "Nothing here: tell the lead which mechanism the policy asks for ('histoflare policy show')."
    ),
    "PROTOCOL_MISMATCH": (
        "If the consortium agreed on this protocol, the lead has to make a kit with it; if not, "
        "nothing is to be done here."
    ),
    "RESOLUTION_NOT_NAMED": (
        "Nothing here: the lead has to name mpp in the job's protocol, as these images are at it."
    ),
    "ROLE_CHANGED": "Put the split of the manifest back as it was when these patients were first used.",
    "SITE_NOT_CONFIGURED": "Complete local/histoflare.toml.",
    "TRAINER_DIED": (
        "Look in the log before this for what it died of, such as too little memory; it is started "
        "anew by itself in the next round."
    ),
    "TRAINING_FAILED": "The lines before this in the job's log say of what.",
}
"""What a site's own people can do about a refusal, where the error does not say it."""

TAKES_PART = (
    "What this site takes part in stands in its own local/policy.toml; 'histoflare policy show' shows it, "
    "and 'histoflare policy set' changes it."
)


def advise(code: str) -> str:
    """Return what a lead can do about a refusal with ``code``; empty if that is up to the site alone."""
    return ADVICE.get(code, "")


def advise_site(code: str) -> str:
    """Return what a site's own people can do about a refusal with ``code``; empty if its error does."""
    if code in ("MODEL_NOT_ALLOWED", "PURPOSE_NOT_ALLOWED", "SCOPE_NOT_ALLOWED", "STRATEGY_NOT_ALLOWED"):
        return TAKES_PART
    return AT_SITE.get(code, "")


def explain(code: str) -> str:
    """Return what ``code`` means in plain words; for an unknown one, where to ask."""
    return REASONS_IN_WORDS.get(code, "A code this report does not know; ask the site.")
