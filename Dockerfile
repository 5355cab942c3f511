# syntax=docker/dockerfile:1
# megasparse on NVIDIA's PyTorch image, whose own torch, Triton, Transformer Engine, apex and flash-attention are kept.
#
#   docker build -t megasparse .
#   docker run --rm megasparse          the versions, and a proof on the CPU that two processes train as one does
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD:/work" megasparse \
#     deepspeed --num_gpus 8 --module megasparse train RECIPE
#
# It runs as user 1000; where $PWD is not that user's, add --user "$(id -u):$(id -g)" -e HOME=/tmp.
#
# 26.07 has torch 2.13.0a0, Triton 3.7.1, CUDA 13.3, Python 3.12 and Transformer Engine 2.17.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3
FROM ${BASE}

ARG MEGATRON_CORE=0.16.1
ARG DEEPSPEED=0.19.8
# Empty: the base's. Else a tag or commit of NVIDIA's repository, such as v2.18, which is compiled here.
ARG TRANSFORMER_ENGINE=
ARG APEX=
# 1 compiles DeepSpeed's FusedAdam now, 0 when a run first needs it.
ARG DS_BUILD_FUSED_ADAM=1
ARG USER_ID=1000

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The deepspeed launcher reaches other hosts by pdsh and ssh; Slurm needs neither.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client openssh-server pdsh \
    && rm -rf /var/lib/apt/lists/*

RUN if [[ -n "${TRANSFORMER_ENGINE}" ]]; then \
        PIP_CONSTRAINT='' NVTE_FRAMEWORK=pytorch pip install --no-cache-dir --no-build-isolation --no-deps \
            "git+https://github.com/NVIDIA/TransformerEngine.git@${TRANSFORMER_ENGINE}"; \
    fi; \
    if [[ -n "${APEX}" ]]; then \
        PIP_CONSTRAINT='' APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-cache-dir --no-build-isolation --no-deps \
            "git+https://github.com/NVIDIA/apex.git@${APEX}"; \
    fi

# What is compiled against the base stays as it is, numpy included; all else has the versions verified together. The
# file takes the place of the base's own constraints, here and for whoever installs more.
WORKDIR /opt/megasparse
COPY constraints.txt pyproject.toml README.md LICENSE ./
ENV PIP_CONSTRAINT=/etc/pip/megasparse.txt
RUN kept='torch|torchvision|torchao|triton|transformer[-_]engine.*|apex|flash[-_]attn.*|numpy' \
    && { PIP_CONSTRAINT='' pip list --format=freeze | grep -iE "^(${kept})=="; \
         grep -viE "^(#|$|(${kept}|deepspeed|megatron-core)==)" constraints.txt; \
         echo "deepspeed==${DEEPSPEED}"; \
         echo "megatron-core==${MEGATRON_CORE}"; } > "${PIP_CONSTRAINT}"

# DeepSpeed compiles against the torch that is here.
RUN DS_BUILD_FUSED_ADAM="${DS_BUILD_FUSED_ADAM}" \
    pip install --no-cache-dir --no-build-isolation "deepspeed==${DEEPSPEED}" "megatron-core==${MEGATRON_CORE}"

COPY megasparse megasparse
COPY examples examples
COPY tools tools
RUN pip install --no-cache-dir .

RUN if id -u ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "${USER_ID}" --shell /bin/bash megasparse \
    && install -d -o megasparse -g megasparse -m 1777 /work
USER ${USER_ID}
WORKDIR /work

CMD ["bash", "-c", "pip list | grep -iE '^(torch|triton|transformer[-_]engine|apex|flash[-_]attn|megatron-core|deepspeed|numpy) ' && megasparse verify /opt/megasparse/examples/pretrain.yaml --layouts ep2 --steps 2"]
