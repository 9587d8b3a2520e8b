"""LangChain's own conformance suite (langchain-tests) for its OpenAI classes, against a cluster.

What is said here of a test that fails is of SmolLM2 with 135 million parameters: answers are the same at every run.
"""

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

from cluster import NAME, PATIENCE


class Served:
    """Tests that know where the cluster is."""

    @pytest.fixture(autouse=True)
    def _served(self, cluster):
        self.where = {"model": NAME, "base_url": cluster.url + "/v1", "api_key": cluster.key}


class Chat(Served, ChatModelIntegrationTests):
    """What the two APIs have in common."""

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        # Small models call again and again where they may, and repeat themselves where nothing is against it.
        return {**self.where, "timeout": PATIENCE, "temperature": 0, "max_tokens": 256,
                "model_kwargs": {"parallel_tool_calls": False}, "extra_body": {"frequency_penalty": 0.5}}

    @property
    def supports_json_mode(self):
        return True

    @property
    def model_override_value(self):
        return NAME

    @pytest.mark.xfail(reason="The model answers in words where it need not call.", strict=True)
    def test_agent_loop(self, model):
        super().test_agent_loop(model)


class TestChatCompletions(Chat):
    @property
    def chat_model_params(self):
        # For another server than OpenAI's the class asks for no usage unless it is told to.
        return {**super().chat_model_params, "stream_usage": True}


class TestResponses(Chat):
    @property
    def chat_model_params(self):
        return {**super().chat_model_params, "use_responses_api": True}


class TestEmbeddings(Served, EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self):
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self):
        # Else it sends the ids of OpenAI's own tokenizer.
        return {**self.where, "check_embedding_ctx_length": False}
