// The whole CUDA library, entry points and kernels, as ops emulated::… that take CPU tensors.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#define hearken emulated
#include "emulator.h"

#define CUDA CPU
#include "../../../csrc/cuda/pack_embeddings.cu"
#include "../../../csrc/ops.cpp"
// Both .cu files name things alike in unnamed namespaces, as they may: apart they must stay here.
#include "../../../csrc/cuda/ragged_conv1d.cu"
