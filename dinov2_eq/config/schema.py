"""Every setting of a training run: the classes are the documentation and the defaults.

Keys keep DINOv2's names where the meaning is the same; every length is in optimizer steps. YAML files under `configs/`
hold differences from these defaults only.
"""

from dataclasses import dataclass, field


@dataclass
class ComputePrecisionConfig:
    dtype: str = (
        "auto"  # autocast dtype: auto (bf16 on a GPU, fp32 on a CPU), fp32 or bf16; weights and losses stay fp32
    )


@dataclass
class DinoConfig:
    loss_weight: float = 1.0  # weight of the DINO term on class tokens; 0: not built
    head_n_prototypes: int = 65536  # outputs of the head
    head_bottleneck_dim: int = 256  # width before the prototypes
    head_nlayers: int = 3  # linear layers before the prototypes
    head_hidden_dim: int = 2048  # width between these layers
    koleo_loss_weight: float = 0.1  # weight of the KoLeo term, which spreads the class tokens of a batch; 0: not built


@dataclass
class IbotConfig:
    loss_weight: float = 1.0  # weight of the iBOT term on masked patch tokens; 0: not built, nothing is masked
    mask_sample_probability: float = 0.5  # share of the global crops that get a mask
    mask_ratio_min_max: list[float] = field(default_factory=lambda: [0.1, 0.5])  # share of the patches a mask hides
    separate_head: bool = False  # false: shares the DINO head; true: a head of its own, sized by the keys below
    head_n_prototypes: int = 65536
    head_bottleneck_dim: int = 256
    head_nlayers: int = 3
    head_hidden_dim: int = 2048


@dataclass
class EquivarianceConfig:
    enabled: bool = True  # false: nothing of the task is built and the run is the plain base method
    loss_weight: float = (
        1.0  # lambda in the total loss; 0: the control, transformed and split but nothing reconstructed
    )
    transform: str = "se2"  # g: rotation, translation, se2, color_jitter, blur, or a registered name
    num_intermediates: int = 2  # K: targets strictly between the base and the transformed view
    border: str = "canvas"  # zeros: black outside the crop (the papers); canvas: real pixels around it
    patch_dim: int = 2048  # d_patch: width of the token projection
    equivariant_dim: int = 512  # d_equi: channels of each projected token that only the decoders see
    decoder: str = "conv"  # conv or cross_attention
    decoder_dim: int = 256  # width of the decoder after its first layer
    decoder_depth: int = 2  # self-attention layers of the cross_attention decoder
    max_angle_deg: float = 45.0  # rotation is uniform in [-max, max] degrees
    max_shift: float = 10 / 224  # shifts are uniform in [-max, max], as a share of the side (the papers: 10 px of 224)
    max_color: float = 0.4  # brightness, contrast and saturation: factor 1 + uniform in [-max, max]
    max_hue: float = 0.1  # hue: uniform in [-max, max] turns
    blur_sigma_min_max: list[float] = field(default_factory=lambda: [0.1, 2.0])  # sigma in pixels


@dataclass
class FsdpConfig:
    strategy: str = "grad_op"  # ddp, full, grad_op or hybrid, see docs/scaling.md; none: a single process only
    activation_checkpointing: bool = False  # compute each block again in the backward pass: less memory, more time
    compile: bool = False  # torch.compile of each block


@dataclass
class StudentConfig:
    pretrained_weights: str = ""  # what training starts from, see docs/continue.md; empty: random weights
    arch: str = "vit_large"  # vit_tiny, vit_small, vit_base, vit_large, vit_giant2
    depth: int | None = None  # number of blocks; null: the architecture's own
    patch_size: int = 16
    drop_path_rate: float = 0.3  # stochastic depth
    drop_path_uniform: bool = True  # true: the same rate in every block; false: linear from 0 to the rate
    layerscale: float = 1.0e-5  # initial LayerScale; 0: none
    ffn_layer: str | None = None  # mlp or swiglu; null: the architecture's own
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    num_register_tokens: int = 0
    interpolate_antialias: bool = False  # for position embeddings at other image sizes
    interpolate_offset: float = 0.1  # 0.1 as DINOv2 without registers, 0 with
    attention: str = "auto"  # auto, sdpa or xformers


@dataclass
class TeacherConfig:
    momentum_teacher: float = 0.992  # EMA momentum at the start
    final_momentum_teacher: float = 1.0  # and at the end (cosine)
    warmup_teacher_temp: float = 0.04  # temperature of the targets at the start
    teacher_temp: float = 0.07  # and after the warm-up (linear)
    warmup_teacher_temp_steps: int = 37500


@dataclass
class OptimConfig:
    steps: int = 125000  # optimizer updates in the whole run
    warmup_steps: int = 12500  # linear warm-up of the learning rate
    base_lr: float = 0.004  # for 1024 images; scaled by scaling_rule
    scaling_rule: str = "sqrt_wrt_1024"  # sqrt_wrt_1024, linear_wrt_256 or none; of the global batch size
    min_lr: float = 1.0e-6  # at the end (cosine), not scaled
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4  # cosine
    freeze_backbone_steps: int = 0  # the backbone keeps its weights that long, while new heads learn
    clip_grad: float = 3.0  # largest gradient norm of each module; 0: no clipping
    freeze_last_layer_steps: int = 1250  # the prototypes keep their initial values that long
    patch_embed_lr_mult: float = 0.2
    layerwise_decay: float = 0.9  # learning rate times this for each block further from the output
    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.999


@dataclass
class CropsConfig:
    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])  # share of the image's area
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    local_crops_number: int = 8
    global_crops_size: int = 224
    local_crops_size: int = 96
    horizontal_flip: float = 0.5  # probability
    jitter_prob: float = 0.8
    jitter: list[float] = field(default_factory=lambda: [0.4, 0.4, 0.2, 0.1])  # brightness, contrast, saturation, hue
    grey_prob: float = 0.2
    blur_prob: list[float] = field(default_factory=lambda: [0.0, 0.9, 0.5])  # global 1, global 2, local: as DINOv2 ran
    solarize_prob: float = 0.2  # of the second global crop
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # pixel statistics, in [0, 1]
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


@dataclass
class TrainConfig:
    dataset_path: str = "Shapes:split=TRAIN"  # data string, see README
    batch_size_per_gpu: int = 64  # images in one forward of one process
    accumulation_steps: int = 1  # forwards in one optimizer step
    centering: str = "centering"  # of the teacher's targets: centering or sinkhorn_knopp
    seed: int = 0  # governs initial weights, order, crops, masks, augmentation and transforms
    num_workers: int = 10  # data-loading processes of each process
    max_corrupt_share: float = 0.01  # the run stops when more than this share of the images read is unreadable
    log_period_steps: int = 10
    checkpoint_period_steps: int = 1250
    keep_checkpoints: int = 3  # the newest so many are kept
    keep_checkpoint_every_steps: int = 0  # those of multiples of so many steps are kept for ever; 0: none
    lost_rank_timeout_s: float = 120.0  # a process that is silent so long ends the run on all others
    device: str = "auto"  # auto, cpu or cuda


@dataclass
class EvaluationConfig:
    eval_period_steps: int = (
        12500  # writes eval/training_<step>/teacher_checkpoint.pth; also at the end; 0: at the end only
    )
    sample_period_steps: int = 1250  # writes samples/step_<step>.npz: views, targets, reconstructions; 0: never
    knn_period_steps: int = 0  # online k-NN on the teacher's class token; 0: never
    knn_train_dataset: str = ""  # labelled data strings; needed where knn_period_steps > 0
    knn_val_dataset: str = ""
    knn_max_images: int = 10000  # of each of the two, the first so many of a fixed shuffle
    knn_k: int = 20


@dataclass
class Config:
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
