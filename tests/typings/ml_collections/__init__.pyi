# What `make lint` believes of ml_collections. By the library's own source an attribute of a ConfigDict may be any of a
# dozen types, and so every use of a value would be an error. The rules in dmpo_jax/config/keys.py check the values.

from ml_collections.config_dict import ConfigDict as ConfigDict
