"""The bundled pair of models, and its training (`models.training`)."""
