from spatial_jax.errors import DataError as DataError  # moved: import from spatial_jax.errors
