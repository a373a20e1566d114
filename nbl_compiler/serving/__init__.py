"""Serving a plan with vLLM: the exported folder, and the plugin that vLLM loads it with.

``export`` and ``refusals`` know nothing of vLLM; ``plugin`` is the entry point, and what lies
behind it (``vllm_models``, ``vllm_layers``, ``vllm_settings``) is imported by vLLM alone.
"""
