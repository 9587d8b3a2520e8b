"""How the suites of others run here."""

import os

# Else it asks the internet what models cost.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"


def pytest_configure(config) -> None:
    # LangChain's tests are async without saying by what.
    config.option.asyncio_mode = "auto"
