"""Every configuration key once: its default, and what it means. The other configs override."""

import os

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

HERE = os.path.dirname(os.path.abspath(__file__))


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # all noise derives from it, together with step, prompt, rollout and position

  c.model = m = ConfigDict()
  m.name = "llada"  # see dmpo_jax.models.MODELS
  m.init_from = ""  # a folder that launch/convert_hf.py wrote, or a run's base or policy; "": random initialisation
  m.vocab_size = 0  # ids, some of which no token may have; 0: the checkpoint's or else the tokenizer's
  m.embedding_size = 0  # rows of the embedding table; 0: the checkpoint's, or vocab_size up to a multiple of 8
  # None: the checkpoint's, or without one that of pretrained.SMALL; what is given must be the checkpoint's
  m.d_model = placeholder(int)
  m.num_layers = placeholder(int)
  m.num_heads = placeholder(int)
  m.num_kv_heads = placeholder(int)
  m.mlp_hidden_size = placeholder(int)
  m.rope_theta = placeholder(float)
  m.rms_norm_eps = placeholder(float)
  m.weight_tying = placeholder(bool)  # the head reuses the embedding
  m.qkv_bias = placeholder(bool)  # queries, keys and values have biases, as in Dream
  m.shift_logits = placeholder(bool)  # the logits of a position predict the next one, as in Dream
  m.quantization = placeholder(str)  # of the layers' projections, which it freezes: none, int8
  m.dtype = "float32"  # of activations: float32, bfloat16
  m.param_dtype = "float32"  # of frozen parameters: the base under adapters, p_ref; what is trained is float32
  m.remat = "none"  # what the backward pass recomputes: none, dots (all but the projections), full (whole layers)
  m.layer_rows = 0  # rows of a device that a layer computes at one time, to hold less for the gradient; 0: all
  m.attention = "auto"  # xla, splash (TPU), cudnn (NVIDIA GPU; bfloat16); auto: the devices' kernel, or xla

  m.lora = lora = ConfigDict()
  lora.rank = 0  # 0: train every parameter, with a frozen copy as the reference policy
  lora.alpha = 64.0  # adapters are scaled by alpha / rank
  lora.dropout = 0.05  # on the adapters' input, in gradient steps only
  lora.targets = ("q_proj", "k_proj", "v_proj", "up_proj")  # or ("all",)
  lora.init_from = ""  # a folder of adapters that launch/convert_hf.py wrote, or a run's policy; "": new ones

  c.tokenizer = t = ConfigDict()
  t.name = "sentencepiece"  # sentencepiece, huggingface (a folder with tokenizer.json)
  t.path = os.path.join(HERE, "tokenizers", "tiny.model")  # "": the folder of model.init_from
  t.is_chat = False  # prompts are a user's turn in the tokenizer's chat template; False: plain text

  c.task = k = ConfigDict()
  k.name = "sudoku"  # see dmpo_jax.tasks.TASKS; or a file of your own, path/to/task.py or path/to/rows.jsonl
  k.prompt = "default"  # default, published_train, published_eval; bare (puzzle and answer alone: sudoku, countdown)
  k.rewards = "default"  # default, published (the official code's, oddities included)
  k.grader = "default"  # what counts as right: default, published
  k.data_dir = ""  # folder of the published data files (gsm8k, math); "": download them
  # a folder, no bucket, where a task's records are kept once generated or read; "": `data` beside the workdir, or where
  # that is in a bucket, `dmpo_jax/data` in the cache of each host's user ($XDG_CACHE_HOME, ~/.cache)
  k.records_dir = ""
  k.eval_path = ""  # a published test file to evaluate on; "": the task's test split
  k.num_train = 8192  # prompts to generate, or the most to take of a data set; 0: all that it has
  k.num_test = 256
  k.max_prompt_length = 32  # tokens; in training every prompt is padded to it
  k.overlong_prompts = "error"  # longer ones: error, skip (counted), cut_user (the user's turn loses its beginning)
  k.sudoku = ConfigDict(
    dict(
      min_blanks=4,
      max_blanks=10,
      demo_patience=6.4,  # of so many blank cells demonstrations leave half blank, of fewer few, of more up to 65 %
      demo_wrong=0.0,  # share of demonstrations in whose blank cells 1 and 2 have changed places
    )
  )
  k.countdown = ConfigDict(
    dict(
      num_numbers=3,
      max_number=99,
      demo_wrong=0.7,  # share of demonstrations whose expression misses the target
    )
  )
  k.gsm8k = ConfigDict()
  k.math = ConfigDict()
  k.user = ConfigDict(dict(grader="exact"))  # of a JSONL file's answers: exact (words), number, math

  c.grading = g = ConfigDict()  # of tasks whose grading may hang or crash: math and a user's own
  g.workers = 2  # processes of each host
  g.seconds = 10.0  # that one completion may take; then it is worth 0 and counted
  g.memory_gb = 4.0  # that one process may address

  c.sampler = s = ConfigDict()
  s.name = "llada"  # see dmpo_jax.samplers.SAMPLERS
  s.completion_length = 16
  s.block_length = 16  # divides completion_length; blocks are decoded left to right
  s.steps = (
    16  # model calls for the whole completion where a sampler has a schedule; a multiple of the number of blocks
  )
  s.temperature = 1.0  # of the rollouts; 0: greedy
  s.guidance = 0.0  # classifier-free: logits = (1 + guidance) * with the prompt - guidance * without; 0: none
  s.llada = ConfigDict(dict(remasking="low_confidence"))  # what is committed first: low_confidence, random
  s.freedave = ConfigDict(dict(remasking="low_confidence", draft_length=4))  # states that a model call runs for a row
  s.entropy_bound = ConfigDict(dict(bound=0.1))  # nats that a call's tokens may have in all but the least certain one
  # tokens that a call commits: count (by steps), threshold (the confident ones), factor (more the surer they are)
  parallel = dict(rule="threshold", threshold=0.9, factor=1.0)
  s.parallel = ConfigDict(parallel)
  s.prefix_cache = ConfigDict(parallel)
  s.dual_cache = ConfigDict(parallel)
  s.wino = ConfigDict(dict(threshold=0.6, threshold_back=0.9))  # to be accepted; to stay at the second look

  c.rollout = r = ConfigDict()
  r.num_prompts = 32  # prompts in a buffer
  r.group_size = 8  # rollouts of each prompt
  r.chunk_prompts = 0  # prompts sampled and scored at one time, a divisor of num_prompts; 0: the whole buffer
  r.pipelined = False  # draw a buffer before the updates on the one before it, and grade it during them
  r.early_exit = False  # a rollout is finished with its first EOS; needs objective.counted = "until_eos"

  c.objective = o = ConfigDict()
  o.name = "wdce"  # see dmpo_jax.objectives.OBJECTIVES
  o.counted = (
    "all"  # completion positions in the likelihood: all, until_eos (the first EOS included, what follows hidden)
  )
  o.num_replicates = 2  # noised copies of each rollout in a gradient step
  o.antithetic = True  # draw masks in complementary pairs
  o.min_mask_ratio = 0.1  # mask ratios are drawn from U(min, max); complements have the rest
  o.max_mask_ratio = 1.0
  o.mask_block_length = 0  # likelihoods elbo and eubo mask inside one block of so many positions; 0: anywhere
  o.sync_reference_every = 0  # updates after which p_ref becomes a copy of the policy; 0: it stays the base

  # log p_old and log p_ref of a buffer (wdce, wddo), or the likelihood that is optimised (the others)
  o.likelihood = "elbo"  # see dmpo_jax.objectives.estimators.ESTIMATORS; sampler: as random_order gave them
  o.num_elbo_replicates = 4  # noised copies of each rollout for log p_ref and log p_old (wdce, wddo)
  o.replicates = "fixed"  # or adaptive: rounds of num_elbo_replicates until the log-ratio is quiet
  o.max_noise = 0.25  # adaptive: largest standard error of the log-ratio, as a share of the spread of reward / alpha
  o.max_rounds = 4
  o.one_step = ConfigDict(dict(prompt_mask_ratio=0.15))  # probability that a prompt token is masked too
  o.elbo_quadrature = ConfigDict(dict(num_points=2))  # mask ratios, at Gauss-Legendre points
  o.eubo = ConfigDict(
    dict(beta=1.5, mixture=0.5)
  )  # exponent, at least 1; share of the upper bound, the rest is the elbo

  # importance weights (wdce, wddo)
  o.weighting = "tilt"  # softmax of log-ratio + reward / alpha; softmax: of the reward; reward: the reward itself
  o.alpha = 0.1  # temperature of the target p_ref * exp(reward / alpha)
  o.proximal = "fixed"  # kappa as given; adaptive: each group's largest that keeps min_ess
  o.kappa = 1.0  # proximal step, in (0, 1]; 1: none
  o.min_ess = 0.8  # effective sample size, as a share of the group
  o.reward_scaling = "none"  # standardise: minus the group's mean, divided by its standard deviation
  o.max_weight = 1.0  # larger weights are cut to this; 1: none is

  # wdce
  o.baseline = "negative"  # subtracted from the weights: none, mean, model, negative
  o.baseline_strength = 1.0
  o.unlearning = "unbounded"  # bounded: a rollout that is pushed down stops counting below min_log_ratio
  o.min_log_ratio = -5.0  # of log p_theta - log p_old, nats
  o.wddo = ConfigDict(dict(sets="shared", alpha_ddo=1.0, beta=1.0))  # or independent masks of the two terms

  # rivals
  o.clip = 0.5  # ratios are clipped to 1 - clip, 1 + clip (diffu_grpo, coupled_grpo, gdpo, tracerl)
  o.kl_weight = 0.04  # of the KL to the reference (tracerl: to the policy that sampled)
  o.sharpness = 1.0  # wd1: of the softmax of advantages
  # of the reward, once a buffer; multiple of the old policy's distribution that the target has
  o.dtm = ConfigDict(dict(tilt=1.0, control_variate=1.0))

  c.warm_start = w = ConfigDict()  # masked-diffusion training on demonstrations, before anything else
  w.updates = 0  # gradient steps; 0: none
  w.batch_size = 128
  w.learning_rate = 3e-3  # peak: linear warm-up over the first tenth, cosine to 0 after
  w.min_mask_ratio = 0.001
  w.flawless = 0.0  # share of the updates, the first ones, whose demonstrations are all right: skill before habits

  c.optim = p = ConfigDict()
  p.learning_rate = 1e-4
  p.warmup_updates = 0  # linear, then constant
  p.b1 = 0.9
  p.b2 = 0.99
  p.weight_decay = 0.0
  p.clip_norm = 1.0  # global norm of the gradient
  p.max_skips_in_a_row = (
    5  # updates with a non-finite loss or gradient are skipped; after so many in a row the run stops
  )

  c.train = n = ConfigDict()
  n.num_buffers = 20  # buffers of rollouts
  n.updates_per_buffer = 2
  n.microbatch_prompts = 0  # prompts whose gradient is computed at one time; 0: the whole buffer

  # sizes of the mesh axes: as many devices as there are, at most (tensor first, then fsdp); -1: what the others leave
  c.sharding = h = ConfigDict()
  h.data = -1  # rows; weights are copied; the only axis that is split over several TPU slices
  h.fsdp = 1  # rows and weights are split
  h.tensor = 1  # heads, feed-forward and vocabulary are split
  # the samplers' mesh, in rollouts and evaluation; 0: as above. Where it is another, all parameters, frozen ones too,
  # are laid out anew for each buffer and each evaluation, need their memory beside the others, and are dropped after it
  h.rollout = ConfigDict(dict(data=0, fsdp=0, tensor=0))

  c.eval = e = ConfigDict()
  e.every_buffers = 0  # 0: only before the first and after the last
  e.num_prompts = 256  # 0: all of the test split
  e.batch_size = 256
  e.temperature = 0.0
  e.num_samples = 1  # completions of each prompt; with more, at a temperature above 0, pass@k is reported too
  e.tasks = ()  # what --mode=eval evaluates: tasks, lengths and samplers, all with all; (): as in training
  e.lengths = ()  # completion lengths, with as many steps a token as in training
  e.samplers = ()
  e.early_exit = True  # a completion is finished with its first EOS

  c.serve = v = ConfigDict()  # --mode=serve, which decodes as evaluation does, but for a request's own temperature
  v.host = "127.0.0.1"  # this machine alone; any other needs DMPO_JAX_API_KEY in the environment
  v.port = 8000  # 0: one that is free
  v.batch_size = 8  # requests decoded at one time
  v.max_queue = 64  # requests that may wait; more are refused (429)
  v.max_prompt_length = 2048  # tokens; longer ones are refused (400), by --mode=sample too
  v.max_seconds = 300.0  # from a request's arrival to its answer (504)

  c.log = l = ConfigDict()
  l.wandb_project = ""  # of Weights & Biases, if that is installed: gets what TensorBoard gets; "": none

  c.checkpoint = x = ConfigDict()
  x.every_updates = 20
  x.keep = 2
  return c
