# The CUDA ops, for nvcc and for the emulation that tests them without a GPU (tests/cuda_emulation).
set(regroup_cuda_sources
  cuda_device.cpp cuda_backend.cpp matmul.cpp matmul_choices.cpp
  attention_choice.cpp attention_shape.cpp cudnn_bias.cu no_cudnn_attention.cpp
  memory.cu activation.cu norm.cu embedding.cu token_sort.cu relative_bias.cu cross_entropy.cu
  adafactor.cu adamw.cu
  attention.cpp attention_bias_gradient.cu simple_attention.cu
  flash_attention_forward.cu flash_attention_backward.cu flash_attention_wgmma.cu)
