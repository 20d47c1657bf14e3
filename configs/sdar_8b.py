"""SDAR-8B-Chat: as sdar_4b.py, with the sizes of the larger model.

python -m launch.convert_hf --hf=JetLM/SDAR-8B-Chat --out=CHECKPOINT
python -m dmpo_jax.main --config=configs/sdar_8b.py --config.model.init_from=CHECKPOINT --workdir=RUN
"""

from configs import llada_8b, sdar_4b

ROW = {length: (2 * sample, 2 * update) for length, (sample, update) in sdar_4b.ROW.items()}  # of twice the parameters


def get_config(settings="256"):
  """Build it for a completion length and a slice: `256`, or `256,v5e-16`."""
  c = sdar_4b.get_config(settings)
  with c.unlocked():
    c.model.d_model = 4096
    c.model.mlp_hidden_size = 12288
    llada_8b.listen_often(c, settings.partition(",")[2], ROW)
  return c
