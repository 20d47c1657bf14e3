"""Every configuration key once, with its default and meaning. The other configurations override them."""

import os

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

HERE = os.path.dirname(os.path.abspath(__file__))


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # noise derives from it, with the step, prompt, rollout and position

  c.model = m = ConfigDict()
  m.init_from = ""  # a folder written by launch/convert_hf.py, or a run's base or policy; "": random initialisation
  m.vocab_size = 0  # number of ids, including unused ones; 0: the checkpoint's, or else the tokenizer's
  m.embedding_size = 0  # rows of the embedding table; 0: the checkpoint's, or vocab_size rounded up to a multiple of 8
  # None: the checkpoint's value or, without one, that of pretrained.SMALL. A given value must be the checkpoint's
  m.d_model = placeholder(int)
  m.num_layers = placeholder(int)
  m.num_heads = placeholder(int)
  m.num_kv_heads = placeholder(int)
  m.head_dim = placeholder(int)  # of queries, keys and values; None without a checkpoint: d_model / num_heads
  m.mlp_hidden_size = placeholder(int)
  m.rope_theta = placeholder(float)
  m.rotary_fraction = placeholder(float)  # of a head, from its first entry on: what positions rotate
  # Llama 3's (factor, low frequency factor, high frequency factor, original length), for longer rows; (): none
  m.rope_scaling = placeholder(tuple)
  m.rms_norm_eps = placeholder(float)
  m.weight_tying = placeholder(bool)  # the head reuses the embedding
  m.qkv_bias = placeholder(bool)  # biases of queries, keys and values, as in Dream and Qwen2
  m.qk_norm = placeholder(bool)  # every head of queries and keys is normed, as in Qwen3
  m.block_length = placeholder(int)  # tokens attend to their own and earlier blocks of so many, as in SDAR; 0: to all
  m.allow_other_blocks = False  # a checkpoint may run with another block_length than its own, to be trained for it
  m.shift_logits = placeholder(bool)  # the logits of a position predict the next token, as in Dream
  m.out_bias = placeholder(bool)  # a bias of attention's output
  m.clip_qkv = placeholder(float)  # bound on queries, keys and values; 0: none
  # how a token's experts are chosen. none: no layer has experts; softmax: as LLaDA-MoE does; softmax_normalised: SDAR;
  # sigmoid: LLaDA2
  m.router = placeholder(str)
  m.num_experts = placeholder(int)  # of a layer
  m.experts_per_token = placeholder(int)
  m.expert_size = placeholder(int)  # feed-forward width of an expert
  m.shared_expert_size = placeholder(int)  # the same of an expert for all tokens; 0: none
  m.expert_layers = placeholder(tuple)  # 1 for each layer with experts, 0 for each without; (): all layers have them
  m.expert_bias = placeholder(bool)  # a constant that is added to the router's probabilities (sigmoid: to choose by)
  # of the router sigmoid: a token's experts are from so many of so many groups, and their weights are scaled
  m.expert_groups = placeholder(int)
  m.expert_groups_per_token = placeholder(int)
  m.expert_scale = placeholder(float)
  # of the projections in the layers, experts included, which freezes them: none, int8
  m.quantization = placeholder(str)
  m.dtype = "float32"  # of activations: float32, bfloat16
  m.param_dtype = "float32"  # of frozen parameters: the base under adapters, p_ref. Trained parameters are float32
  # what the backward pass computes again, from nothing to whole layers: none; products (all but matrix products); dots
  # (attention and adapters too); attention (not that, but the feed-forward); full. Each keeps less than the one before
  m.remat = "none"
  # rows of a device, one for each mask sample, that a layer computes at a time, to save memory in the gradient step;
  # 0: all
  m.layer_rows = 0
  m.attention = "auto"  # xla, splash (TPU), cudnn (NVIDIA GPU, bfloat16); auto: the kernel of the devices, or xla

  m.lora = lora = ConfigDict()
  lora.rank = 0  # 0: train every parameter, with a frozen copy as the reference policy
  lora.alpha = 64.0  # adapters are scaled by alpha / rank
  lora.dropout = 0.05  # on the adapters' input, in gradient steps only
  lora.targets = ("q_proj", "k_proj", "v_proj", "up_proj")  # or ("all",)
  lora.init_from = ""  # a folder of adapters written by launch/convert_hf.py, or a run's policy; "": new adapters

  c.tokenizer = t = ConfigDict()
  t.name = "sentencepiece"  # sentencepiece, huggingface (a folder with tokenizer.json)
  t.path = os.path.join(HERE, "tokenizers", "tiny.model")  # "": the folder of model.init_from
  t.is_chat = False  # a prompt is a user's turn in the tokenizer's chat template; False: plain text
  t.chat_template_kwargs = (
    ""  # switches of the template as JSON: {"enable_thinking": false} for Qwen3 and SDAR; "": none
  )

  c.task = k = ConfigDict()
  k.name = "sudoku"  # see dmpo_jax.tasks.TASKS; your own file, path/to/task.py or path/to/rows.jsonl; or mixture
  # the tasks of a mixture and their shares, "{'gsm8k': 0.5, 'countdown': 0.5}". A share may be a dict of it and of what
  # the task has for itself: {'share': 0.5, 'num_train': 1000, 'seconds': 2.0} (see dmpo_jax.tasks.mixture)
  k.mixture = ""
  k.prompt = "default"  # default, published_train, published_eval; bare (sudoku, countdown, knights, code)
  k.rewards = "default"  # default, published (the official code's, oddities included)
  k.grader = "default"  # what counts as correct: default, published
  k.data_dir = ""  # folder of the published data files (gsm8k, math, code); "": download them
  # a folder, not a bucket, for the records of a task once they are generated or read. "": `data` beside the workdir or,
  # if that is in a bucket, `dmpo_jax/data` in the user's cache on each host ($XDG_CACHE_HOME, ~/.cache)
  k.records_dir = ""
  k.eval_path = ""  # a published test file for evaluation; "": the test split of the task
  k.num_train = 8192  # prompts to generate, or the most to take from a data set; 0: all of them
  k.num_test = 256
  # training prompts that come first, from easy to hard (blank cells, numbers, people), in a warm start and in rollouts;
  # 0: in random order from the start
  k.curriculum = 0
  k.max_prompt_length = 32  # tokens
  k.overlong_prompts = "error"  # longer ones: error, skip (counted), cut_user (cuts the beginning of the last turn)
  k.sudoku = ConfigDict(
    dict(
      min_blanks=4,
      max_blanks=10,
      demo_patience=6.4,  # demonstrations leave half of so many blanks blank, less of fewer, up to 65 % of more
      demo_wrong=0.0,  # share of demonstrations that swap 1 and 2 in the blank cells
      size=4,  # of the grid: 4, 9
    )
  )
  k.countdown = ConfigDict(
    dict(
      num_numbers=3,
      max_number=99,
      demo_wrong=0.7,  # share of demonstrations whose expression misses the target
      max_numbers=0,  # puzzles have num_numbers to so many numbers, each equally often; 0: num_numbers
    )
  )
  k.knights = ConfigDict(
    dict(
      min_people=3,
      max_people=5,
      demo_wrong=0.5,  # share of demonstrations that are wrong about the last person
    )
  )
  k.gsm8k = ConfigDict()
  k.math = ConfigDict()
  k.code = ConfigDict(
    dict(
      test="mbpp",  # problems to evaluate on: mbpp, humaneval
      shown_tests=1,  # of a problem's tests, those in the prompt, which show the name of the function
    )
  )
  k.user = ConfigDict(dict(grader="exact"))  # for the answers of a JSONL file: exact (words), number, math

  c.grading = g = ConfigDict()  # for tasks whose grading may hang or crash: math, code and your own
  g.workers = 2  # processes per host
  g.seconds = 10.0  # time limit for a completion, which otherwise gets reward 0 and is counted
  g.memory_gb = 4.0  # address space limit of a process
  # of a reward that is an `async def`: calls that a process waits for at a time; further attempts after an error or
  # `seconds` without an answer
  g.concurrency = 16
  g.retries = 2
  g.sandbox = "bubblewrap"  # where the code that a model writes runs; none: as any program that you start

  c.sampler = s = ConfigDict()
  s.name = "llada"  # see dmpo_jax.samplers.SAMPLERS
  s.completion_length = 16
  s.block_length = 16  # must divide completion_length; blocks are decoded left to right
  s.steps = 16  # model calls per completion for samplers with a schedule; a multiple of the number of blocks
  s.temperature = 1.0  # of rollouts; 0: greedy
  # continuous batching: rows that rollouts, evaluation and --mode=sample decode at a time, each replaced when it is
  # done; 0: fixed batches. For models that attend by blocks; with these --mode=serve always does so
  s.slots = 0
  s.guidance = 0.0  # classifier-free: logits = (1 + guidance) * conditional - guidance * unconditional; 0: none
  s.llada = ConfigDict(dict(remasking="low_confidence"))  # the tokens to remask: low_confidence, random
  s.freedave = ConfigDict(dict(remasking="low_confidence", draft_length=4))  # states per row in a model call
  s.entropy_bound = ConfigDict(dict(bound=0.1))  # nats: total entropy of a call's tokens but the least certain one
  # tokens that a call commits: count (by steps), threshold (confident ones), factor (more, the more confident they
  # are), entropy (by steps, the most certain ones, as in Dream's own code)
  parallel = dict(rule="threshold", threshold=0.9, factor=1.0)
  s.parallel = ConfigDict(parallel)
  s.prefix_cache = ConfigDict(parallel)
  s.dual_cache = ConfigDict(parallel)
  # to accept a token; to replace one of the block; tokens of a call at least; calls on a block without a MASK at most
  s.editing = ConfigDict(dict(threshold=0.95, edit_threshold=0.9, min_tokens=1, max_checks=16))
  s.wino = ConfigDict(dict(threshold=0.6, threshold_back=0.9))  # to accept a token; to keep it at the second look

  c.rollout = r = ConfigDict()
  r.num_prompts = 32  # prompts per buffer
  r.group_size = 8  # rollouts per prompt
  r.chunk_prompts = 0  # prompts sampled and scored at a time, a divisor of num_prompts; 0: the whole buffer
  # rollouts of a chunk's prompt, a divisor of group_size; 0: all. Fewer, with chunk_prompts = 1, let a run look for a
  # notice of preemption more often
  r.chunk_rollouts = 0
  # most lengths to which training pads prompts, chosen for the task with least padding; prompts of one length are
  # sampled, scored and learned from together. Each is compiled before its first use. 1: task.max_prompt_length for all
  r.prompt_lengths = 4
  r.pipelined = False  # generate a buffer before the updates on the previous one, and grade it during them
  # updates leave out groups whose rewards are all the same, and compute the others alone; for objectives that compare
  # the rewards of a group
  r.drop_equal_groups = True
  # groups whose rewards differ: further batches of num_prompts are generated until a buffer has so many; 0: one batch
  r.until_informative = 0
  r.max_batches = 4  # of a buffer
  r.early_exit = False  # a rollout ends with its first EOS; needs objective.counted = "until_eos"

  c.objective = o = ConfigDict()
  o.name = "wdce"  # see dmpo_jax.objectives.OBJECTIVES
  # completion positions in the likelihood: all, until_eos (up to and including the first EOS; later ones are hidden)
  o.counted = "all"
  o.num_mask_samples = 2  # masks of each rollout in a gradient step
  # where these masks, and those of elbo, unweighted, eubo (and coupled: not trajectory), come from. random: a ratio,
  # then positions with that probability; stratified: the same with the ratios of a group spread evenly; trajectory:
  # what the sampler had still to decide at a random point of its own trajectory
  o.masks = "random"
  o.antithetic = True  # draw masks in complementary pairs; not along a trajectory
  o.min_mask_ratio = 0.1  # mask ratios are drawn from U(min, max); a complement has 1 - ratio
  o.max_mask_ratio = 1.0
  o.mask_block_length = 0  # elbo, unweighted and eubo mask within one block of so many positions; 0: anywhere
  o.sync_reference_every = 0  # updates after which p_ref becomes a copy of the policy; 0: never, p_ref is the base

  # estimates log p_old and log p_ref of a buffer (wdce, wddo), or the likelihood to optimise (the others)
  o.likelihood = "elbo"  # see dmpo_jax.objectives.estimators.ESTIMATORS; sampler: reported by random_order
  o.num_elbo_samples = 4  # masks of each rollout for log p_ref and log p_old (wdce, wddo)
  o.elbo_rounds = "fixed"  # or adaptive: rounds of num_elbo_samples until the log-ratio has little noise
  o.max_noise = 0.25  # adaptive: largest standard error of the log-ratio, relative to the spread of reward / alpha
  o.max_rounds = 4
  o.one_step = ConfigDict(dict(prompt_mask_ratio=0.15))  # probability that a prompt token is masked too
  o.elbo_quadrature = ConfigDict(dict(num_points=2))  # number of mask ratios, at Gauss-Legendre points
  # exponent, at least 1; share of the upper bound, the rest is the elbo
  o.eubo = ConfigDict(dict(beta=1.5, mixture=0.5))

  # importance weights (wdce, wddo)
  o.weighting = "tilt"  # softmax of log-ratio + reward / alpha; softmax: of the reward; reward: the reward itself
  o.alpha = 0.1  # temperature of the target p_ref * exp(reward / alpha)
  o.proximal = "fixed"  # kappa as given; adaptive: the largest kappa of each group that keeps min_ess
  o.kappa = 1.0  # proximal step, in (0, 1]; 1: none
  o.min_ess = 0.8  # effective sample size, relative to the group size
  # standardise: subtract the mean of the group, divide by its standard deviation; standardise_parts: do so with each
  # part of the reward, then add them up
  o.reward_scaling = "none"
  o.part_weights = ()  # standardise_parts: a weight for each part, in the task's order; (): 1 each
  o.max_weight = 1.0  # larger weights are cut to this; 1: no cut
  o.shrinkage = "none"  # reliability: multiply a group's log-ratio by the share of its spread that is no noise

  # keys of one objective each
  o.denoise = d = ConfigDict()  # supervised: demonstrations instead of rollouts, rollout.num_prompts at a time
  d.schedule = "linear"  # share of masked positions at time t, which is drawn from U(min_mask_ratio, max_mask_ratio)
  d.weight = "bound"  # of a mask sample: bound (1 / t if linear, LLaDA's), scheduler (dllm's: + 1e-6), uniform
  # divides the loss by the counted tokens of each sequence, of the buffer (token); by sequences (batch); by the masked
  # tokens of a microbatch (masked)
  d.normalisation = "sequence"
  d.level = "sequence"  # what has a time of its own; or block, of a model that attends by blocks
  o.wdce = d = ConfigDict()
  d.baseline = "negative"  # subtracted from the weights: none, mean, model, negative
  d.baseline_strength = 1.0
  d.unlearning = "unbounded"  # bounded: a rollout that is pushed down stops counting below min_log_ratio
  d.min_log_ratio = -5.0  # of log p_theta - log p_old, nats
  # masks of log p_old for the baseline model and bounded unlearning. buffer: those of the log-ratio; update: those of
  # each update, which has less noise and costs num_mask_samples more model calls an update
  d.old_masks = "buffer"
  # sets of masks: shared, independent; scale of the real term: proper, official (divided by the group size)
  o.wddo = ConfigDict(dict(sets="shared", alpha_ddo=1.0, beta=1.0, scale="proper"))

  # ratios are clipped to [1 - clip, 1 + clip]; the KL is to the reference (tracerl: to the policy that sampled)
  clipped = dict(clip=0.5, kl_weight=0.04)
  o.diffu_grpo = ConfigDict(clipped)
  o.coupled_grpo = ConfigDict(clipped)
  o.gdpo = ConfigDict(clipped)
  o.espo = ConfigDict(clipped)
  o.gdsd = ConfigDict(clipped | dict(guidance=1.0))  # nats a token that an advantage of 1 asks for
  o.tracerl = ConfigDict(clipped)
  o.ebpo = ConfigDict(dict(clip=0.2, clip_high=0.2, kl_weight=0.0))
  o.bgpo = ConfigDict(dict(clip=0.2, most=3.0, kl_weight=0.0))  # most: ratio from which on no rollout is pushed down
  o.wd1 = ConfigDict(dict(sharpness=1.0))  # multiplies the advantages in the softmax
  # tilt: multiplies the reward. control_variate: multiple of the old policy's distribution in the target
  o.dtm = ConfigDict(dict(tilt=1.0, control_variate=1.0))

  c.warm_start = w = ConfigDict()  # masked-diffusion training on demonstrations, before the first buffer
  w.updates = 0  # gradient steps; 0: none
  w.batch_size = 128
  w.learning_rate = 3e-3  # peak: linear warm-up over the first tenth, then cosine to 0
  w.min_mask_ratio = 0.001
  w.correct_share = (
    0.0  # share of the updates, from the start, that see only correct demonstrations: skill before habits
  )

  c.optim = p = ConfigDict()
  p.learning_rate = 1e-4
  p.warmup_updates = 0  # linear, then constant
  p.b1 = 0.9
  p.b2 = 0.99
  p.weight_decay = 0.0
  p.clip_norm = 1.0  # global norm of the gradient
  # updates with a non-finite loss or gradient are skipped; after so many in a row the run stops
  p.max_skips_in_a_row = 5

  c.train = n = ConfigDict()
  n.num_buffers = 20  # buffers of rollouts
  n.updates_per_buffer = 2
  n.microbatch_prompts = 0  # prompts whose gradient is computed at a time; 0: the whole buffer

  # sizes of the mesh axes, capped at the number of devices (tensor first, then fsdp); -1: what the others leave
  c.sharding = h = ConfigDict()
  h.data = -1  # splits rows, copies weights; the only axis that spans several TPU slices
  h.fsdp = 1  # splits rows and weights
  h.tensor = 1  # splits heads, feed-forward and vocabulary
  # the samplers' mesh, in rollouts and evaluation; 0: as above. If it differs, all parameters, frozen ones too, are
  # copied to it for each buffer and each evaluation. The copy needs memory of its own and is dropped afterwards
  h.rollout = ConfigDict(dict(data=0, fsdp=0, tensor=0))

  c.eval = e = ConfigDict()
  # besides before the first buffer and after the last; 0: only then. An evaluation decodes num_prompts * num_samples
  # completions. Here that is a buffer's, so it takes a fifth of the time of sampling; the larger configurations choose
  # theirs to take a few percent
  e.every_buffers = 5
  e.num_prompts = 256  # 0: all of the test split
  e.batch_size = 256
  e.temperature = 0.0
  e.num_samples = 1  # completions per prompt; with more, and a temperature above 0, pass@k is reported too
  e.tasks = ()  # --mode=eval evaluates every combination of tasks, lengths and samplers; (): as in training
  e.lengths = ()  # completion lengths, with as many steps per token as in training
  e.samplers = ()
  e.early_exit = True  # a completion ends with its first EOS

  c.serve = v = ConfigDict()  # --mode=serve: decodes like evaluation, but at the temperature of the request
  v.host = "127.0.0.1"  # this machine only; any other address needs DMPO_JAX_API_KEY in the environment
  v.port = 8000  # 0: a free one
  v.batch_size = 8  # requests decoded at a time
  v.max_queue = 64  # waiting requests; further ones are refused (429)
  v.max_prompt_length = 2048  # tokens; longer ones are refused (400), by --mode=sample too
  v.max_seconds = 300.0  # from the arrival of a request to its answer (504)

  c.log = l = ConfigDict()
  l.wandb_project = ""  # Weights & Biases, if installed, gets the same figures as TensorBoard; "": not used

  c.checkpoint = x = ConfigDict()
  x.every_updates = 20
  x.keep = 2
  return c
