"""The settings of a training run: one flat set of names for flags, YAML keys, the stored config and the docs.

Later wins: dataclass defaults, then the YAML file, then flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffpref.training.config_checks import check_base_dtype, check_cache, check_compile, check_hub, check_packing, check_validation
from diffpref.training.order import check_order


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything but the method's own hyper-parameters, which live in its class."""

    method: str = "diffusion_dpo"
    """Recipe that is trained: a loss, the path to its noisy latents and the guards it wears; --help lists them."""

    pretrained_model_name_or_path: str | None = None
    """Base model of the SD or SDXL family: a diffusers folder, a hub id or a single .safetensors checkpoint."""
    revision: str | None = None
    """Git revision of a hub model."""
    variant: str | None = None
    """Weight variant of the model files, such as fp16."""
    single_file_config: str | None = None
    """Folder or hub id with the configs and tokenizers of a single-file checkpoint; the family's public one when not given."""
    pretrained_vae_model_name_or_path: str | None = None
    """Another autoencoder, such as SDXL's one mended for fp16: a folder, hub id or .safetensors file."""
    unet_init: str | None = None
    """Other UNet weights for policy and reference: a UNet or pipeline folder, .safetensors, or a state dict such as unet.pth."""
    start_lora: str | None = None
    """LoRA to start from, in diffusers' or kohya's form: a file or a folder with pytorch_lora_weights.safetensors."""
    start_lora_as: Literal["base", "adapter"] = "base"
    """base: the LoRA is merged, policy and reference start with it; adapter: it is trained further, the reference is without it."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; the checkpoint's scheduler decides when not given. The exported scheduler says it, too."""
    rescale_betas_zero_snr: bool | None = None
    """Whether the noise schedule ends in pure noise; the checkpoint's scheduler decides when not given. Needs v_prediction."""
    is_turbo: bool = False
    """Train at SDXL Turbo's noise levels only: timesteps 249, 499 and 749, on a schedule that ends in pure noise (docs/models.md)."""
    tune: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter (the reference is the model without it) or all UNet weights (the reference is a frozen copy)."""
    rank: int = 16
    """Rank of the LoRA adapter."""
    lora_alpha: float | None = None
    """Scale numerator of the adapter; the rank when not given, so that the scale is 1."""
    lora_targets: str = "attention"
    """UNet layers that get an adapter: attention, all, or layer names separated by commas."""
    use_dora: bool = False
    """Train magnitude and direction of the adapted UNet weights apart (DoRA)."""
    use_rslora: bool = False
    """Scale the adapter by lora_alpha / sqrt(rank) in place of lora_alpha / rank."""
    train_text_encoder: bool = False
    """Also train LoRA adapters on the attention of the text encoders."""
    use_ema: bool = False
    """Keep a moving average of the trained weights; it is what is validated and exported."""
    ema_decay: float = 0.999
    """Share of the average that stays at each optimizer step, at most (1 + n) / (10 + n) after n steps; higher averages over more."""

    train_data_dir: str | None = None
    """Local preference data: a file or folder in one of the forms of docs/data.md."""
    dataset_name: str | None = None
    """Preference pairs by hub id; give this or train_data_dir."""
    dataset_config_name: str | None = None
    """Configuration of a hub data set that has several."""
    data_format: str = "auto"
    """Form of a row or of the files; auto looks. Rows: pairs, chosen_rejected, votes, ranked, hpd, labelled, captions; files: parquet,

    jsonl, webdataset, folder."""
    streaming: bool = False
    """Read the data while training, max_train_samples pairs of it; the first pass is shuffled within windows only (docs/data.md)."""
    split: str = "train"
    """Split to train on."""
    caption_column: str | None = None
    """Column of the prompts, if it is not found under a known name."""
    image_0_column: str | None = None
    """Column of the first image, of the better one for chosen_rejected, or of the list of images."""
    image_1_column: str | None = None
    """Column of the second image, or of the worse one."""
    label_column: str | None = None
    """Column with the probability that the first image is better, or with the ranks of a list."""
    user_column: str | None = None
    """Column of the annotator."""
    ranked_pairs: Literal["all", "best_worst"] = "all"
    """Which pairs a ranked list of images gives: every pair of different rank, or the best against the worst."""
    list_size: int | None = None
    """Pictures of each ranked list that methods on lists use: longer lists are thinned out, shorter ones left out; all when not given."""
    caption_edits: tuple[str, ...] = ()
    """Sets of words, such as 'red green blue': where a second caption is missing, the prompt with a word exchanged within its set."""
    desirable_share: float | None = None
    """Share of good pictures among the single ones that Diffusion-KTO draws, 0.8 in its paper; that of the data when not given."""
    curriculum_stages: int | None = None
    """Train on clear pairs first, in this many stages that each add pairs with smaller gaps; 5 in Curriculum-DPO."""
    curriculum_steps: int = 400
    """Optimizer steps of a stage; the last one lasts until the end."""
    curriculum_score: str | None = None
    """Scorer whose score gaps order the pairs; the gaps in rank of ranked lists when not given."""
    rarity_score: str | None = None
    """Weigh pairs by how rare their score gap by this scorer is, as VideoDPO does; all alike when not given."""
    rarity_exponent: float = 1.0
    """Weight is (mean share / share of the gap's bin) to this power; 0 is no weighting."""
    rarity_bins: int = 20
    """Bins of equal width in the histogram of gaps."""
    reference_update_steps: int | None = None
    """Optimizer steps after which the reference moves to the policy; it stays what it was at the start when not given."""
    reference_decay: float = 0.0
    """Share of the reference that stays at each move: 0 copies the policy, 0.999 is a slow moving average."""
    choice_model: str | None = None
    """Scorer whose columns <name>_0 and <name>_1 decide which image is preferred, in place of the label; equal scores are a tie."""
    dreamlike_pairs_only: bool = False
    """Keep pairs whose model_0 and model_1 both contain "dream", as in Salesforce's script."""
    cache_dir: str | None = None
    """Where hub data sets, copies of parquet files, streamed pairs and the results of the image check are kept."""
    max_train_samples: int | None = None
    """Use only the first pairs of the data."""
    held_out_pairs: int = 0
    """Pairs kept out of training for the implicit accuracy, split by prompt."""
    tie_policy: Literal["drop", "keep", "error"] = "drop"
    """What happens to ties: dropped and counted, kept with probability 0.5, or an error."""
    label_noise_prob: float = 0.0
    """Probability that a label is flipped before training, fixed per pair: 0.5 is the random-label control, 1.0 the inverted one."""
    check_images: bool = True
    """Decode every image once before training, so that bad rows are set aside at the start; the result is kept for later starts."""
    resolution: int | None = None
    """Side of the training pictures in pixels; the model's own when not given."""
    random_crop: bool = False
    """Crop at random (shared by the pair) instead of at the centre."""
    no_hflip: bool = False
    """Do not mirror pairs at random; needed when left and right matter to the preference."""
    flip_mode: Literal["shared", "independent"] = "shared"
    """Mirror both pictures of a pair together, or each by a draw of its own as Salesforce's script does."""
    aspect_ratio_buckets: bool = False
    """Train on pictures of several aspect ratios of about resolution x resolution pixels in place of square crops."""
    bucket_step: int = 64
    """Pixels by which the sides of the buckets differ."""
    proportion_empty_prompts: float = 0.0
    """Share of pairs whose prompt is replaced by the empty one, drawn once per pair and visit."""
    cache_latents: bool = False
    """Encode all pictures and prompts once and keep them in memory; not with random_crop. A latent_cache has them already."""
    latent_cache: str | None = None
    """Folder made by `diffpref cache` with the settings of this run: latents and prompts are read from it, nothing is encoded."""
    reference_errors: str | None = None
    """File of the reference's errors at every visit of the run, made first if it is not there; training then asks no reference."""
    dataloader_num_workers: int = 0
    """Processes that decode pictures; does not change what is seen."""
    vae_encode_batch_size: int = 8
    """Pictures that the autoencoder encodes at once."""

    max_train_steps: int = 2000
    """Optimizer steps."""
    num_train_epochs: int | None = None
    """Passes over the pairs; decides in place of max_train_steps when given."""
    train_batch_size: int = 1
    """Pairs per process and forward pass."""
    gradient_accumulation_steps: int = 16
    """Forward passes per optimizer step."""
    learning_rate: float = 5e-5
    """Rate of the optimizer, as it is used unless scale_lr is given."""
    scale_lr: bool = False
    """Multiply learning_rate by the pairs per update, as published commands with a rate of 1e-8 expect."""
    lr_scheduler: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"] = (
        "constant_with_warmup"
    )
    """Schedule, counted in optimizer steps."""
    lr_num_cycles: int = 1
    """Restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of the polynomial schedule."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_4bit", "adafactor", "prodigy", "schedule_free"] = "adamw"
    """adamw_8bit needs bitsandbytes, adamw_4bit torchao, prodigy and schedule_free their packages: pip install diffpref[optim]."""
    lr_warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = 0.9
    """AdamW's first moment decay."""
    adam_beta2: float = 0.999
    """AdamW's second moment decay."""
    adam_weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    gradient_checkpointing: Literal["off", "selective", "full"] = "off"
    """What the backward pass computes again to save memory: nothing, what costs little, or all blocks (docs/speed.md)."""
    channels_last: bool = False
    """Lay the UNet's pictures out with channels last, which tensor cores prefer for convolutions."""
    compile: bool = False
    """Compile the UNet's blocks at the first step, policy and reference as one graph (docs/speed.md)."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Autocast dtype of the UNet's forward passes; the launcher's when not given. Trained weights and losses stay in float32."""
    base_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the weights (UNet, text encoders), fp32 or that of mixed_precision; under tune full bf16 is rounded stochastically."""
    allow_tf32: bool = False
    """Let GPUs multiply float32 matrices in TF32: faster, with 10 bits of mantissa."""
    pack_weights: bool = False
    """On a CPU, keep frozen weights in its kernels' own layouts, too: faster, with up to four times their memory (docs/speed.md)."""
    attention: str = "sdpa"
    """Attention kernel of the UNet, tried before it is used: sdpa is torch's own choice; xformers and others are in docs/speed.md."""
    shard: Literal["no", "weights", "gradients"] = "no"
    """Split over the processes: nothing; weights, gradients and optimizer state; or gradients and optimizer state (docs/scale.md)."""
    preflight: Literal["refuse", "warn", "off"] = "refuse"
    """What happens when memory, disk or kernels would not suffice: the run is refused, warned about, or nothing is checked."""

    output_dir: str | None = None
    """Run folder; outputs/<method>-<time> when not given."""
    seed: int = 0
    """Seed of every draw: order, noise, timesteps, flips, adapter initialisation."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = None
    """Keep this many checkpoints; the oldest goes after the newest is complete."""
    rank_timeout: int = 1800
    """Seconds that a process waits for the others before the run ends with an error."""
    save_in_background: bool = False
    """Write checkpoints while training goes on, from a copy of the tensors in RAM."""
    non_finite: Literal["skip", "stop", "roll_back"] = "skip"
    """After a loss or gradient that is not finite: skip the update (3 in a row end the run), stop, or go back to the last checkpoint."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the newest complete one of output_dir with "latest"."""
    restart: bool = False
    """With "latest": begin again at step 0 when every checkpoint is damaged, instead of refusing."""
    allow_change: tuple[str, ...] = ()
    """Settings whose values a resumed run may change, "learning_rate beta"; it is then no longer the run that it was."""
    validation_steps: int | None = None
    """Optimizer steps between held-out accuracy and validation pictures; none when not given."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the validation pictures; the first held-out prompts when not given."""
    num_validation_images: int = 4
    """Pictures per validation, the base model's beside the policy's."""
    validation_scorer: str | None = None
    """Scorer of the validation pictures: its name, or name=weights."""
    early_stopping_patience: int | None = None
    """Stop after this many validations without a better value of early_stopping_metric, and export the best."""
    early_stopping_metric: Literal["implicit_accuracy", "scorer"] = "implicit_accuracy"
    """Held-out accuracy of the implicit reward, or the mean of validation_scorer."""
    merge_lora: bool = False
    """After a LoRA run also write the complete pipeline with the adapter merged into its weights."""
    report_to: str = "none"
    """Trackers beside metrics.jsonl: none, all, or names of accelerate's trackers separated by commas, such as tensorboard,wandb."""
    logging_dir: str = "logs"
    """Folder of the trackers' files, inside output_dir."""
    tracker_project_name: str = "diffpref"
    """Project name in the trackers."""
    push_to_hub: bool = False
    """Upload the finished model and its card to the hub."""
    hub_model_id: str | None = None
    """Hub repository; the name of output_dir when not given."""
    hub_token: str | None = field(default=None, repr=False)
    """Token of the hub; the one of `hf auth login` or HF_TOKEN when not given. It is stored nowhere."""

    def __post_init__(self) -> None:
        if isinstance(self.gradient_checkpointing, bool):  # as a switch, which older settings and other scripts have
            object.__setattr__(self, "gradient_checkpointing", "full" if self.gradient_checkpointing else "off")
        _check_ranges(self)
        check_compile(self)
        check_packing(self)
        check_cache(self)
        if self.bucket_step != TrainConfig.bucket_step and not self.aspect_ratio_buckets:
            raise ValueError(f"bucket_step is {self.bucket_step}, but there are no buckets; add aspect_ratio_buckets or leave it out")
        if self.aspect_ratio_buckets and self.streaming:
            raise ValueError(
                "aspect_ratio_buckets is true together with streaming: the sizes of all pictures must be known at the start; "
                "switch one of them off"
            )
        check_order(self)
        _check_tuning(self)
        check_validation(self)
        if self.validation_steps and not (self.validation_prompts or self.held_out_pairs):
            raise ValueError(
                f"validation_steps is {self.validation_steps}, but there is nothing to validate with: "
                "add held_out_pairs or validation_prompts"
            )
        _check_start(self)
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm is 0, which would remove every gradient; use a positive norm, for example 1.0")
        if self.train_data_dir and self.dataset_name:
            raise ValueError(
                f"train_data_dir {self.train_data_dir!r} and dataset_name {self.dataset_name!r} are both given; keep the one to train on"
            )
        check_hub(self)
        _check_data(self)

    @property
    def data_source(self) -> str | None:
        """The folder or hub id of the pairs."""
        return self.train_data_dir or self.dataset_name

    @property
    def named_data(self) -> str:
        """The setting that names the pairs, with its value, to begin an error with."""
        return f"{'train_data_dir' if self.train_data_dir else 'dataset_name'} {self.data_source!r}"


_AT_LEAST = {
    "rank": 1,
    "max_train_steps": 1,
    "num_train_epochs": 1,
    "lr_num_cycles": 1,
    "vae_encode_batch_size": 1,
    "bucket_step": 1,
    "early_stopping_patience": 1,
    "train_batch_size": 1,
    "rank_timeout": 1,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "validation_steps": 1,
    "max_train_samples": 1,
    "curriculum_stages": 1,
    "curriculum_steps": 1,
    "rarity_exponent": 0,
    "rarity_bins": 1,
    "reference_update_steps": 1,
    "held_out_pairs": 0,
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 0,
    "num_validation_images": 1,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "resolution": 1,
}


def _check_data(config: TrainConfig) -> None:
    if config.dataset_config_name and not config.dataset_name:
        raise ValueError(f"dataset_config_name is {config.dataset_config_name!r}, but dataset_name is not given; local data has none")
    if not config.streaming:
        return
    if config.max_train_samples is None:
        raise ValueError("streaming is true without max_train_samples, the number of pairs to take from the stream; give it")
    for name in ("held_out_pairs", "label_noise_prob", "cache_latents", "latent_cache"):
        if getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)} together with streaming: it needs all pairs before training; drop one of them"
            )


def _check_start(config: TrainConfig) -> None:
    if config.start_lora_as == "adapter" and config.start_lora is None:
        raise ValueError("start_lora_as is adapter, but no start_lora is given; add the LoRA to go on from")
    if config.start_lora_as == "adapter" and config.tune == "full":
        raise ValueError("start_lora_as is adapter, but tune is full, which has no adapter; use start_lora_as base, or tune lora")
    if config.is_turbo and config.rescale_betas_zero_snr is not None:
        raise ValueError(
            f"rescale_betas_zero_snr is {config.rescale_betas_zero_snr}, but is_turbo brings the schedule that it is trained on, and the "
            "scheduler that it is sampled with stays; leave rescale_betas_zero_snr out"
        )


def _check_ranges(config: TrainConfig) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:  # also true of nan
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name in ("proportion_empty_prompts", "label_noise_prob", "ema_decay", "reference_decay"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a share between 0 and 1")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"seed is {config.seed}; it must be a non-negative integer below 2**63")


def _check_tuning(config: TrainConfig) -> None:
    """Settings that the chosen way of training would ignore."""
    for name in ("use_dora", "use_rslora", "train_text_encoder"):
        if config.tune == "full" and getattr(config, name):
            raise ValueError(f"{name} is true, but it is about LoRA adapters and tune is full; leave it out or use tune lora")
    check_base_dtype(config)
    needed = {
        "ema_decay": ("use_ema", config.use_ema),
        "curriculum_steps": ("curriculum_stages", config.curriculum_stages is not None),
        "curriculum_score": ("curriculum_stages", config.curriculum_stages is not None),
        "rarity_exponent": ("rarity_score", config.rarity_score is not None),
        "rarity_bins": ("rarity_score", config.rarity_score is not None),
        "reference_decay": ("reference_update_steps", config.reference_update_steps is not None),
        "lr_num_cycles": ("lr_scheduler cosine_with_restarts", config.lr_scheduler == "cosine_with_restarts"),
        "lr_power": ("lr_scheduler polynomial", config.lr_scheduler == "polynomial"),
    }
    for name, (what, present) in needed.items():
        if not present and getattr(config, name) != getattr(TrainConfig, name):
            raise ValueError(f"{name} is {getattr(config, name)}, which only {what} uses; leave it out or add that")
