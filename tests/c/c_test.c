/* The C99 ABI, compiled as C with -pedantic: forward and backward against a float64 loop, and every error a caller can make. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tilewise/tilewise.h"

static int failures = 0;

static void expect(int condition, int line, const char* what) {
  if (condition) return;
  printf("line %d: %s (last error: %s)\n", line, what, tw_last_error());
  ++failures;
}
#define EXPECT(condition) expect(condition, __LINE__, #condition)

static void expect_error(tw_status status, tw_status code, const char* message, int line) {
  if (status == code && strcmp(tw_last_error(), message) == 0) return;
  printf("line %d: status %d and '%s', expected %d and '%s'\n", line, (int)status, tw_last_error(), (int)code, message);
  ++failures;
}
#define EXPECT_ERROR(status, code, message) expect_error(status, code, message, __LINE__)

enum { kSeqlen = 20, kHeads = 3, kDim = 8, kElements = kSeqlen * kHeads * kDim, kRows = kSeqlen * kHeads };
static float q[kElements], k[kElements], v[kElements], o[kElements], dout[kElements], dq[kElements], dk[kElements], dv[kElements];
static float lse[kRows];

static int at(int row, int head, int c) { return (row * kHeads + head) * kDim + c; }

static void draw(float* values, unsigned seed) {
  int i;
  for (i = 0; i < kElements; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / (1 << 23) - 1;
  }
}

static tw_tensor rows_of(float* data) {
  const int64_t shape[4] = {1, kSeqlen, kHeads, kDim};
  return tw_tensor_contiguous(data, TW_FLOAT32, 4, shape);
}
static tw_tensor lse_of(float* data) {
  const int64_t shape[3] = {1, kHeads, kSeqlen};
  return tw_tensor_contiguous(data, TW_FLOAT32, 3, shape);
}

/* Causal attention of one head in float64; outputs and gradients must be within 1e-5. */
static void compare_with_float64(int with_gradients) {
  static double p[kSeqlen][kSeqlen];
  const double scale = 1 / sqrt((double)kDim);
  int h, i, j, c;
  for (h = 0; h < kHeads; ++h) {
    double expect_dk[kSeqlen][kDim] = {{0}}, expect_dv[kSeqlen][kDim] = {{0}};
    for (i = 0; i < kSeqlen; ++i) {
      double sum = 0, delta = 0, expect_o[kDim] = {0}, expect_dq[kDim] = {0};
      for (j = 0; j <= i; ++j) {
        double s = 0;
        for (c = 0; c < kDim; ++c) s += (double)q[at(i, h, c)] * k[at(j, h, c)];
        p[i][j] = exp(s * scale);
        sum += p[i][j];
      }
      EXPECT(fabs(lse[h * kSeqlen + i] - log(sum)) < 1e-5);
      for (j = 0; j <= i; ++j) {
        p[i][j] /= sum;
        for (c = 0; c < kDim; ++c) expect_o[c] += p[i][j] * v[at(j, h, c)];
      }
      for (c = 0; c < kDim; ++c) {
        EXPECT(fabs(o[at(i, h, c)] - expect_o[c]) < 1e-5);
        delta += expect_o[c] * dout[at(i, h, c)];
      }
      for (j = 0; j <= i; ++j) {
        double dp = 0, ds;
        for (c = 0; c < kDim; ++c) dp += (double)dout[at(i, h, c)] * v[at(j, h, c)];
        ds = p[i][j] * (dp - delta) * scale;
        for (c = 0; c < kDim; ++c) {
          expect_dq[c] += ds * k[at(j, h, c)];
          expect_dk[j][c] += ds * q[at(i, h, c)];
          expect_dv[j][c] += p[i][j] * dout[at(i, h, c)];
        }
      }
      for (c = 0; with_gradients && c < kDim; ++c) EXPECT(fabs(dq[at(i, h, c)] - expect_dq[c]) < 1e-5);
    }
    for (j = 0; with_gradients && j < kSeqlen; ++j) {
      for (c = 0; c < kDim; ++c) {
        EXPECT(fabs(dk[at(j, h, c)] - expect_dk[j][c]) < 1e-5);
        EXPECT(fabs(dv[at(j, h, c)] - expect_dv[j][c]) < 1e-5);
      }
    }
  }
}

static void* aligned_memory(size_t bytes, void** memory) {
  *memory = malloc(bytes + 255);
  return *memory ? (char*)*memory + (256 - (uintptr_t)*memory % 256) % 256 : NULL;
}

static void test_plan(void) {
  tw_problem problem;
  tw_device device;
  tw_plan* plan = NULL;
  tw_arguments arguments;
  void* memory;

  tw_problem_init(&problem, sizeof problem);
  tw_device_init(&device, sizeof device);
  tw_arguments_init(&arguments, sizeof arguments);
  EXPECT(tw_device_cpu(2, &device) == TW_OK && device.type == TW_CPU && device.units == 2 && device.name[0] && device.arch[0]);

  problem.seqlen_q = problem.seqlen_k = kSeqlen;
  problem.num_heads_q = problem.num_heads_kv = kHeads;
  problem.head_dim = problem.head_dim_v = kDim;
  problem.window_right = 0;
  arguments.q = rows_of(q);
  arguments.k = rows_of(k);
  arguments.v = rows_of(v);
  arguments.o = rows_of(o);
  arguments.lse = lse_of(lse);
  arguments.dout = rows_of(dout);
  arguments.dq = rows_of(dq);
  arguments.dk = rows_of(dk);
  arguments.dv = rows_of(dv);

  EXPECT(tw_plan_create(&problem, &device, &plan) == TW_OK);
  EXPECT(strlen(tw_plan_kernel(plan)) > 0);
  arguments.workspace = aligned_memory(tw_plan_workspace_bytes(plan), &memory);
  EXPECT(tw_plan_run(plan, &arguments, NULL) == TW_OK);
  compare_with_float64(0);
  arguments.o.rank = 3;
  EXPECT_ERROR(tw_plan_run(plan, &arguments, NULL), TW_INVALID_ARGUMENT,
               "o has shape [1, 20, 3], but the problem needs [batch 1, seqlen_q 20, num_heads_q 3, head_dim_v 8]");
  arguments.o.rank = 4;
  tw_plan_destroy(plan);
  free(memory);

  problem.pass = TW_BACKWARD;
  EXPECT(tw_plan_create(&problem, NULL, &plan) == TW_OK);
  arguments.workspace = aligned_memory(tw_plan_workspace_bytes(plan), &memory);
  EXPECT(tw_plan_run(plan, &arguments, NULL) == TW_OK);
  compare_with_float64(1);
  tw_plan_destroy(plan);
  free(memory);
}

static void test_one_call(void) {
  tw_options options;
  tw_tensor tq = rows_of(q), tk = rows_of(k), tv = rows_of(v), to = rows_of(o), tlse = lse_of(lse), tdout = rows_of(dout);
  tw_tensor tdq = rows_of(dq), tdk = rows_of(dk), tdv = rows_of(dv);
  tw_options_init(&options, sizeof options);
  options.causal = 1;
  memset(o, 0, sizeof o);
  memset(dq, 0, sizeof dq);
  memset(dk, 0, sizeof dk);
  memset(dv, 0, sizeof dv);
  EXPECT(tw_forward(&tq, &tk, &tv, &to, &tlse, &options) == TW_OK);
  EXPECT(tw_backward(&tdout, &tq, &tk, &tv, &to, &tlse, &tdq, &tdk, &tdv, &options) == TW_OK);
  compare_with_float64(1);
  EXPECT(tw_forward(&tq, &tk, &tv, &to, NULL, NULL) == TW_OK);
  EXPECT_ERROR(tw_forward(&tq, NULL, &tv, &to, NULL, NULL), TW_INVALID_ARGUMENT, "k is missing");
  EXPECT_ERROR(tw_forward(&tq, &tk, &tv, NULL, NULL, NULL), TW_INVALID_ARGUMENT, "o is missing: the problem needs it");
  options.reserved = 3;
  EXPECT_ERROR(tw_forward(&tq, &tk, &tv, &to, NULL, &options), TW_INVALID_ARGUMENT, "tw_options.reserved is 3, but it must be 0");
  options.reserved = 0;
  options.struct_size = 8;
  EXPECT(tw_forward(&tq, &tk, &tv, &to, NULL, &options) == TW_INVALID_ARGUMENT);
  EXPECT(strncmp(tw_last_error(), "tw_options.struct_size is 8, but this library needs ", 52) == 0);
}

static void test_problem(void) {
  tw_problem problem, again;
  char text[200];
  size_t length;
  const char* line =
      "bwd b2 q4096 k8192 h32/8 d128/64 bf16 window=5,-1 topleft packed tq300 tk400 seqused scale=0.1 softcap=30 alibi sink "
      "deterministic accumulate";
  tw_problem_init(&problem, sizeof problem);
  tw_problem_init(&again, sizeof again);
  EXPECT(problem.batch == 1 && problem.window_left == -1 && problem.window_right == -1 && problem.struct_size == sizeof problem);
  EXPECT(tw_problem_parse(line, &problem) == TW_OK);
  EXPECT(tw_problem_validate(&problem) == TW_OK);
  EXPECT(tw_problem_format(&problem, text, sizeof text, &length) == TW_OK);
  EXPECT(strcmp(text, line) == 0 && length == strlen(line));
  EXPECT(tw_problem_parse(text, &again) == TW_OK && memcmp(&problem, &again, sizeof problem) == 0);
  EXPECT(tw_problem_format(&problem, text, 4, &length) == TW_OK);
  EXPECT(strcmp(text, "bwd") == 0 && length == strlen(line));
  EXPECT(tw_problem_format(&problem, NULL, 0, &length) == TW_OK && length == strlen(line));
  EXPECT_ERROR(
      tw_problem_parse("q4 d8 foo=1", &again), TW_INVALID_ARGUMENT,
      "token 'foo=1' is none of fwd bwd b q k h d fp32 bf16 fp16 causal window= topleft packed tq tk seqused scale= softcap= alibi "
      "sink deterministic accumulate");
  EXPECT(memcmp(&problem, &again, sizeof problem) == 0); /* untouched by the error */
  problem.num_heads_kv = 5;
  EXPECT_ERROR(tw_problem_validate(&problem), TW_INVALID_ARGUMENT, "num_heads_q 32 is not a multiple of num_heads_kv 5");
}

static void test_mistakes(void) {
  tw_problem problem;
  tw_device device;
  tw_arguments arguments;
  tw_plan* plan = (tw_plan*)&problem;
  const int64_t shape[1] = {1};
  tw_problem_init(&problem, sizeof problem);
  tw_device_init(&device, sizeof device);
  tw_arguments_init(&arguments, sizeof arguments);
  tw_problem_init(NULL, 0);
  EXPECT_ERROR(tw_problem_parse(NULL, &problem), TW_INVALID_ARGUMENT, "text is NULL");
  EXPECT_ERROR(tw_problem_parse("q4 d8", NULL), TW_INVALID_ARGUMENT, "tw_problem is NULL");
  EXPECT_ERROR(tw_problem_format(NULL, NULL, 0, NULL), TW_INVALID_ARGUMENT, "tw_problem is NULL");
  EXPECT_ERROR(tw_problem_format(&problem, NULL, 9, NULL), TW_INVALID_ARGUMENT, "buffer is NULL");
  EXPECT_ERROR(tw_plan_create(NULL, NULL, &plan), TW_INVALID_ARGUMENT, "tw_problem is NULL");
  EXPECT(plan == NULL);
  EXPECT_ERROR(tw_plan_create(&problem, NULL, NULL), TW_INVALID_ARGUMENT, "plan is NULL");
  EXPECT_ERROR(tw_plan_create(&problem, NULL, &plan), TW_INVALID_ARGUMENT, "head_dim 0 is not positive");
  EXPECT_ERROR(tw_plan_run(NULL, &arguments, NULL), TW_INVALID_ARGUMENT, "plan is NULL");
  EXPECT_ERROR(tw_device_cpu(-1, &device), TW_INVALID_ARGUMENT, "threads -1 is negative");
  EXPECT_ERROR(tw_device_cpu(0, NULL), TW_INVALID_ARGUMENT, "tw_device is NULL");
  EXPECT(tw_device_cuda(1 << 20, &device) == TW_UNAVAILABLE);
  EXPECT_ERROR(tw_device_cuda(-1, &device), TW_INVALID_ARGUMENT, "Device::cuda(-1): index -1 is negative");
  device.reserved = 1;
  EXPECT_ERROR(tw_plan_create(&problem, &device, &plan), TW_INVALID_ARGUMENT, "tw_device.reserved is 1, but it must be 0");
  device.reserved = 0;
  device.type = 9;
  EXPECT_ERROR(tw_plan_create(&problem, &device, &plan), TW_INVALID_ARGUMENT, "tw_device.type 9 is neither TW_CPU nor TW_CUDA");
  EXPECT(tw_plan_workspace_bytes(NULL) == 0 && strcmp(tw_plan_kernel(NULL), "") == 0);
  tw_plan_destroy(NULL);
  EXPECT(tw_tensor_contiguous(&problem, TW_FLOAT32, 5, shape).rank == 0);
  EXPECT(tw_tensor_contiguous(&problem, TW_FLOAT32, 1, NULL).rank == 0);
  problem.struct_size = 0;
  EXPECT(tw_problem_validate(&problem) == TW_INVALID_ARGUMENT);
  EXPECT(tw_problem_parse("q4 d600", &problem) == TW_INVALID_ARGUMENT);
  tw_problem_init(&problem, sizeof problem);
  EXPECT(tw_problem_parse("q4 d8", &problem) == TW_OK);
  device.type = TW_CPU;
  EXPECT_ERROR(tw_plan_create(&problem, &device, &plan), TW_INVALID_ARGUMENT,
               "device was not filled in: Device::cpu() or tw_device_cpu() does");
  EXPECT(tw_problem_parse("q4 d600", &problem) == TW_OK);
  EXPECT(tw_plan_create(&problem, NULL, &plan) == TW_UNSUPPORTED && plan == NULL);
}

int main(void) {
  draw(q, 1);
  draw(k, 2);
  draw(v, 3);
  draw(dout, 4);
  EXPECT(strcmp(tw_version(), TEST_VERSION) == 0);
  test_plan();
  test_one_call();
  test_problem();
  test_mistakes();
  printf("%d failures\n", failures);
  return failures != 0;
}
