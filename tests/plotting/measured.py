"""A measurement as `hf-xsam sharpness` writes it."""

SHARPNESS = {
    "model": "tiny",
    "loss": 1.234,
    "gradient_norm": 0.5,
    "eigenvalues": [12.5, -0.0025],
    "gradient_angles_degrees": [56.0, 89.0],
    "trace": {"mean": 20.0, "standard_error": 3.0, "samples": 8},
    "sam_sharpness": {"0.05": 0.01},
    "slices": {},
    "settings": {"targets": 512},
    "versions": {"torch": "2.13.0"},
}
