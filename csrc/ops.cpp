// Every schema of the extension; cpu/ and cuda/ register the kernels, train/ops/ the fakes and
// the autograd formulas. Arguments and shapes are explained in train/ops/.
//
// starts, lengths, out_starts, group_starts: int64 [S]; out_starts and group_starts are those of
// packed segments, so the segment of a row is found in them by bisection.
// keep_sums: also return what an activation was made of, which its gradient wants; else, and where
// there is no activation, `sums` has no rows.
// activation: 0 none, 1 gelu, 2 glu. Gradients that are not needed come back empty.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(hearken, m) {
  m.def(
      "ragged_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor starts, Tensor lengths, "
      "Tensor out_starts, Tensor group_starts, int out_rows, int groups, int stride, "
      "int padding, int activation, bool keep_sums) -> (Tensor y, Tensor sums)");
  m.def(
      "ragged_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Tensor sums, "
      "Tensor starts, Tensor lengths, Tensor out_starts, Tensor group_starts, int groups, "
      "int stride, int padding, int activation, bool need_x, bool need_weight, bool need_bias) "
      "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "pack_embeddings(Tensor table, Tensor speech, Tensor source, Tensor ln_weight, "
      "Tensor ln_bias, float eps, ScalarType dtype) -> Tensor");
  m.def(
      "pack_embeddings_backward(Tensor grad, Tensor table, Tensor speech, Tensor source, "
      "Tensor ln_weight, Tensor ln_bias, float eps, bool need_table, bool need_speech, "
      "bool need_ln) "
      "-> (Tensor grad_table, Tensor grad_speech, Tensor grad_ln_weight, Tensor grad_ln_bias)");
}
