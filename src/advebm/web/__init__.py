"""The web page for trained models.  Only ``page`` and ``server`` import Gradio, an optional dependency."""
