"""The web page: a trained model in a browser.  Only ``page`` and ``server`` know Gradio, which is an extra."""
