/* The same library from C99: a problem, a plan, a run, and what an error looks like. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tilewise/tilewise.h"

enum { kSeqlen = 256, kHeads = 2, kDim = 32, kElements = kSeqlen * kHeads * kDim };

static int failed(const char* what) {
  fprintf(stderr, "%s: %s\n", what, tw_last_error());
  return 1;
}

int main(void) {
  static float q[kElements], k[kElements], v[kElements], o[kElements];
  const int64_t shape[4] = {1, kSeqlen, kHeads, kDim};
  tw_problem problem;
  tw_plan* plan = NULL;
  tw_arguments arguments;
  char* memory;
  size_t bytes;
  int i;

  /* Equal keys make equal weights: every output is the mean of v, which is 1 here. */
  for (i = 0; i < kElements; ++i) {
    q[i] = (float)(i % 17) / 17;
    k[i] = 0.5f;
    v[i] = (i / (kHeads * kDim)) % 2 ? 2.0f : 0.0f;
  }

  tw_problem_init(&problem, sizeof problem);
  if (tw_problem_parse("b1 q256 h2 d32 fp32", &problem) != TW_OK) return failed("parse");
  if (tw_plan_create(&problem, NULL, &plan) != TW_OK) return failed("plan");

  /* The workspace is the caller's, aligned to 256 bytes. */
  bytes = tw_plan_workspace_bytes(plan);
  memory = malloc(bytes + 255);
  if (!memory) return 1;

  tw_arguments_init(&arguments, sizeof arguments);
  arguments.q = tw_tensor_contiguous(q, TW_FLOAT32, 4, shape);
  arguments.k = tw_tensor_contiguous(k, TW_FLOAT32, 4, shape);
  arguments.v = tw_tensor_contiguous(v, TW_FLOAT32, 4, shape);
  arguments.o = tw_tensor_contiguous(o, TW_FLOAT32, 4, shape);
  arguments.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
  if (tw_plan_run(plan, &arguments, NULL) != TW_OK) return failed("run");
  printf("kernel %s, workspace %lu bytes, o[0] = %g\n", tw_plan_kernel(plan), (unsigned long)bytes, o[0]);
  free(memory);
  tw_plan_destroy(plan);

  for (i = 0; i < kElements; ++i) {
    if (fabsf(o[i] - 1) > 1e-5f) return 1;
  }

  /* An error is a status and a sentence. */
  if (tw_problem_parse("b1 q256 h30/8 d32", &problem) != TW_INVALID_ARGUMENT) return 1;
  printf("an error: %s\n", tw_last_error());
  return 0;
}
