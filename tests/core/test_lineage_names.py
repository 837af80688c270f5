"""Names of closed models are known in whatever form they are written, and those of open weights are not taken for them.

The names stand as public lists of models, gateways and dataset cards write them (November 2026 and before), one a line.
"""

import pytest

from kd_plugin.lineage.names import normalized
from kd_plugin.lineage.registry import UNREAD_API, default_registry

CLOSED = {
    "openai-terms": """
        gpt-3.5-turbo
        gpt-3.5-turbo-0125
        gpt-3.5-turbo-1106
        gpt-3.5-turbo-instruct
        gpt-35-turbo
        gpt-35-turbo-16k
        gpt-4
        gpt-4-0613
        gpt-4-32k
        gpt-4-1106-preview
        gpt-4-vision-preview
        gpt-4-turbo
        gpt-4-turbo-2024-04-09
        gpt-4o
        gpt-4o-2024-08-06
        gpt-4o-mini
        gpt-4o-mini-search-preview
        gpt-4o-audio-preview
        gpt-4o-realtime-preview
        gpt-4o-transcribe
        gpt-4.1
        gpt-4.1-mini
        gpt-4.1-nano-2025-04-14
        gpt-4.5-preview
        gpt-5
        gpt-5-mini
        gpt-5-nano
        gpt-5-pro
        gpt-5-codex
        gpt-5-chat-latest
        gpt-5.1
        gpt-5.1-codex-max
        gpt-5.2-thinking
        gpt-realtime
        gpt-realtime-mini
        gpt-audio
        gpt-image-1
        gpt4
        gpt4o
        GPT4-turbo
        GPT-4o
        GPT 4
        GPT_4
        chatgpt
        ChatGPT
        chatgpt-4o-latest
        chat-gpt-4
        o1
        o1-mini
        o1-preview-2024-09-12
        o1-pro
        o3
        o3-mini-high
        o3-deep-research
        o4-mini
        o4-mini-2025-04-16
        codex-mini-latest
        computer-use-preview
        davinci-002
        babbage-002
        text-davinci-003
        text-curie-001
        code-davinci-002
        code-cushman-001
        text-embedding-3-large
        text-embedding-ada-002
        dall-e-3
        whisper-1
        tts-1-hd
        openai/gpt-4o
        openai/gpt-5
        openai:gpt-4o
        openai/o1
        OpenAI GPT-4o
        OpenAI/ChatGPT
        azure/gpt-35-turbo
        azure/gpt-4o/my-deployment
        azure-gpt-4o
        openrouter/openai/gpt-4o-mini:free
        github_copilot/gpt-4o
        ft:gpt-3.5-turbo-0613:acme::7p4lURel
        ft:gpt-4o-mini-2024-07-18:acme:suffix:id
    """,
    "anthropic-terms": """
        claude
        claude-1
        claude-2.1
        claude-v1.3-100k
        claude-instant-1.2
        claude-3-opus-20240229
        claude-3-sonnet
        claude-3-haiku
        claude-3-5-sonnet-20241022
        claude-3.5-sonnet
        claude-3-7-sonnet-latest
        claude-opus-4-20250514
        claude-opus-4-1
        claude-opus-4.5
        claude-sonnet-4-5-20250929
        claude-haiku-4-5
        claude-next-2029
        Claude 3 Opus
        claude_3_opus
        claude3
        anthropic/claude-3.5-sonnet:beta
        anthropic.claude-3-haiku-20240307-v1:0
        us.anthropic.claude-3-5-sonnet-20241022-v2:0
        apac.anthropic.claude-3-sonnet-20240229-v1:0
        bedrock/anthropic.claude-v2
        vertex_ai/claude-3-5-sonnet@20240620
        arn:aws:bedrock:us-east-1::foundation-model/anthropic.claude-v2:1
    """,
    "gemini-terms": """
        gemini
        gemini-pro
        gemini-1.0-pro-vision
        gemini-1.5-flash-8b
        gemini-1.5-pro-002
        gemini-2.0-flash-001
        gemini-2.0-flash-thinking-exp-01-21
        gemini-2.5-pro
        gemini-2.5-flash-lite
        gemini-2.5-flash-image
        gemini-2.5-flash-native-audio-preview
        gemini-3-pro-preview
        gemini-exp-1206
        gemini-nano
        gemini-embedding-001
        gemini-robotics-er-1.5-preview
        models/gemini-pro
        google/gemini-2.5-pro
        vertex_ai/gemini-1.5-pro
        publishers/google/models/gemini-2.0-flash
        text-bison
        text-bison@001
        chat-bison-32k
        code-bison
        codechat-bison
        text-unicorn
        palm-2
        learnlm-1.5-pro-experimental
        Gemini 1.5 Pro
    """,
    "xai-terms": """
        grok
        grok-1.5
        grok-1.5v
        grok-2-1212
        grok-2-vision-1212
        grok-3
        grok-3-mini-fast
        grok-4
        grok-4-0709
        grok-4-fast-reasoning
        grok-4-fast-non-reasoning
        grok-4.1
        grok-code-fast-1
        grok-beta
        xai/grok-3-mini
        x-ai/grok-4
        Grok 3
    """,
    UNREAD_API: """
        amazon.nova-pro-v1:0
        nova-lite
        amazon.titan-text-express-v1
        qwen-max
        qwen-plus-latest
        qwen2.5-max
        qwen3-max
        doubao-pro-32k
        ernie-4.0-turbo-8k
        hunyuan-turbos-latest
        sonar-pro
        palmyra-x5
        yi-lightning
        moonshot-v1-8k
        abab6.5s-chat
    """,
}
OPEN = """
    gpt2
    gpt2-xl
    gpt-2
    openai-community/gpt2-large
    openai-gpt
    openai-community/openai-gpt
    openai/gpt-oss-20b
    openai/gpt-oss-120b
    openai/gpt-oss-safeguard-20b
    gpt-oss:20b
    unsloth/gpt-oss-20b-GGUF
    openai/whisper-large-v3
    openai/clip-vit-large-patch14
    EleutherAI/gpt-neo-2.7B
    EleutherAI/gpt-neox-20b
    EleutherAI/gpt-j-6b
    gpt-j-6B
    gptj
    nomic-ai/gpt4all-j
    nomic-ai/gpt4all-13b-snoozy
    togethercomputer/GPT-JT-6B-v1
    AI-Sweden-Models/gpt-sw3-1.3b
    cerebras/Cerebras-GPT-13B
    bigcode/gpt_bigcode-santacoder
    microsoft/DialoGPT-medium
    microsoft/biogpt
    ai-forever/mGPT
    ai-forever/rugpt3large_based_on_gpt2
    TurkuNLP/gpt3-finnish-13B
    chavinlo/gpt4-x-alpaca
    TheBloke/gpt4-x-vicuna-13B-GPTQ
    umd-zhou-lab/claude2-alpaca-13B
    google/gemma-2b
    google/gemma-2-9b-it
    google/gemma-3-27b-it
    google/gemma-3n-E4B-it
    google/codegemma-7b
    google/shieldgemma-9b
    google/recurrentgemma-2b
    google/flan-t5-xxl
    google/bert_uncased_L-4_H-256_A-4
    google-bert/bert-base-uncased
    google/electra-small-discriminator
    google/switch-base-8
    xai-org/grok-1
    xai-org/grok-2
    grok-1
    hpcai-tech/grok-1
    meta-llama/Llama-2-7b-hf
    meta-llama/Meta-Llama-3-8B-Instruct
    meta-llama/Llama-3.1-405B
    meta-llama/Llama-3.3-70B-Instruct
    meta-llama/Llama-4-Scout-17B-16E
    codellama/CodeLlama-7b-hf
    mistralai/Mistral-7B-v0.1
    mistralai/Mixtral-8x22B-v0.1
    mistralai/Mistral-Small-24B-Instruct-2501
    mistralai/Devstral-Small-2505
    mistralai/Magistral-Small-2506
    mistralai/Codestral-22B-v0.1
    Qwen/Qwen2.5-7B-Instruct
    Qwen/Qwen2.5-72B
    Qwen/Qwen3-235B-A22B
    Qwen/Qwen3-8B
    Qwen/QwQ-32B
    Qwen/Qwen2-VL-7B-Instruct
    qwen2.5:7b
    deepseek-ai/DeepSeek-R1
    deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    deepseek-ai/DeepSeek-R1-Distill-Llama-70B
    deepseek-ai/DeepSeek-V3.1
    deepseek-ai/DeepSeek-V2-Lite
    deepseek-r1:671b
    microsoft/phi-2
    microsoft/Phi-3-mini-4k-instruct
    microsoft/phi-4
    microsoft/Orca-2-13b
    moonshotai/Kimi-K2-Instruct
    moonshotai/Moonlight-16B-A3B
    zai-org/GLM-4.5
    THUDM/glm-4-9b-chat
    MiniMaxAI/MiniMax-M2
    MiniMaxAI/MiniMax-Text-01
    01-ai/Yi-34B
    01-ai/Yi-1.5-9B-Chat
    baichuan-inc/Baichuan2-13B-Chat
    internlm/internlm2-7b
    tiiuae/falcon-40b
    tiiuae/Falcon3-7B-Base
    ibm-granite/granite-3.3-8b-instruct
    nvidia/Llama-3.1-Nemotron-70B-Instruct-HF
    nvidia/Nemotron-4-340B-Instruct
    tencent/Hunyuan-Large
    tencent/Hunyuan-A13B-Instruct
    baidu/ERNIE-4.5-21B-A3B-PT
    nghuyong/ernie-3.0-base-zh
    stepfun-ai/step3
    ai21labs/AI21-Jamba-Mini-1.6
    CohereForAI/c4ai-command-r-plus
    CohereForAI/aya-23-8B
    databricks/dbrx-instruct
    databricks/dolly-v2-12b
    mosaicml/mpt-7b
    stabilityai/stablelm-3b-4e1t
    LGAI-EXAONE/EXAONE-4.0-32B
    LiquidAI/LFM2-1.2B
    allenai/OLMo-2-1124-7B
    allenai/tulu-3-sft-mixture
    HuggingFaceTB/SmolLM2-135M-Instruct
    HuggingFaceH4/zephyr-7b-beta
    lmsys/vicuna-13b-v1.5
    WizardLMTeam/WizardLM-13B-V1.2
    teknium/OpenHermes-2.5-Mistral-7B
    NousResearch/Hermes-3-Llama-3.1-8B
    Open-Orca/Mistral-7B-OpenOrca
    upstage/SOLAR-10.7B-v1.0
    Writer/palmyra-small
    Writer/Palmyra-Med-70B
    facebook/opt-1.3b
    facebook/galactica-6.7b
    bigscience/bloom-560m
    bigscience/T0pp
    Salesforce/codegen-350M-mono
    Salesforce/xgen-7b-8k-base
    EleutherAI/pythia-1.4b
    OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5
    AIDC-AI/Marco-o1
    O1-OPEN/OpenO1-LLama-8B-v0.1
    hpcai-tech/Open-Sora
    claude-monet/impressionist-7b
    grokfast/llama-8b
    gemini-lab/mistral-7b-tuned
    gptq-models/qwen-7b
    amazon/MistralLite
    amazon/chronos-t5-small
"""


def names(block):
    return [line.strip() for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize(("service", "name"), [(s, n) for s, block in CLOSED.items() for n in names(block)])
def test_closed(service, name):
    assert default_registry().service_of_model(name) == service


@pytest.mark.parametrize("name", names(OPEN))
def test_open(name):
    assert default_registry().service_of_model(name) is None


def test_the_table_is_large_enough():
    assert sum(len(names(block)) for block in (*CLOSED.values(), OPEN)) >= 200


@pytest.mark.parametrize(
    "written",
    [
        "GPT\u20114o",  # a non-breaking hyphen
        "gpt\u20134o",
        "\uff27\uff30\uff34-4o",  # full width
        "g\u0440t-4o",  # a Cyrillic letter
        "gpt-4\u043e",
        "gpt\u200b-4o",  # a zero-width space
        "gpt\u00ad-4o",
        " openai / gpt-4o ".replace(" / ", "/"),
        "gpt__4o",
        "GPT - 4o",
        "gpt-4o:latest",
        "openai/GPT\u00a04o",
    ],
)
def test_other_spellings_of_one_name(written):
    assert default_registry().service_of_model(written) == "openai-terms"


def test_one_form_of_a_name():
    assert normalized("  OpenAI  GPT_4o ") == "openai-gpt-4o"
    assert normalized("Llama\u20113.1") == "llama-3.1"
