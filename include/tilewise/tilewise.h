/* Tilewise for C99: the same nouns as tilewise.hpp, where semantics, shapes and units are told.
 *
 *   tw_problem problem;
 *   tw_problem_init(&problem, sizeof problem);
 *   if (tw_problem_parse("b2 q4096 h32/8 d128 bf16 causal", &problem) != TW_OK) puts(tw_last_error());
 *
 * Every structure that may grow begins with struct_size, which its _init function sets: initialise it, then set fields.
 * A function that can fail returns a tw_status; tw_last_error() then says what was wrong, in one sentence. NULL where a
 * pointer is needed is an error, never a crash. All functions may be called from any thread. */
#ifndef TILEWISE_TILEWISE_H
#define TILEWISE_TILEWISE_H

#include <stddef.h>
#include <stdint.h>

#ifndef TW_API
#if defined(_WIN32)
#define TW_API __declspec(dllexport)
#else
#define TW_API __attribute__((visibility("default")))
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* a cudaStream_t is a pointer to it */

typedef enum tw_status {
  TW_OK = 0,
  TW_INVALID_ARGUMENT = 1, /* the caller's mistake: no machine could run this */
  TW_UNSUPPORTED = 2,      /* a legal problem that no kernel here accepts */
  TW_UNAVAILABLE = 3       /* a device, driver or amount of memory that is not there */
} tw_status;

/* Values of fields of type int32_t. */
enum { TW_FLOAT32 = 0, TW_BFLOAT16 = 1, TW_FLOAT16 = 2, TW_INT32 = 3 }; /* dtype */
enum { TW_FORWARD = 0, TW_BACKWARD = 1 };                               /* pass */
enum { TW_BOTTOM_RIGHT = 0, TW_TOP_LEFT = 1 };                          /* alignment */
enum { TW_CPU = 0, TW_CUDA = 1 };                                       /* device type */

/* What is to be computed: tilewise::Problem. Flags: 0 is no, anything else is yes. */
typedef struct tw_problem {
  size_t struct_size;
  int32_t pass, dtype;
  int64_t batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v;
  int32_t has_softmax_scale; /* 0: softmax_scale is not read, 1/sqrt(head_dim) is used */
  float softmax_scale, softcap;
  int32_t alignment;
  int64_t window_left, window_right; /* inclusive, -1: unbounded; causal is window_right 0 */
  int64_t total_q, total_k;          /* packed only */
  int32_t packed, seqused_k, alibi, sink, deterministic;
  int32_t accumulate; /* backward: dq, dk and dv are float32, and the gradients are added to what they hold */
} tw_problem;

/* A processor. Fill it with tw_device_cpu() or tw_device_cuda(). */
typedef struct tw_device {
  size_t struct_size;
  int32_t type, index;
  char name[128], arch[32];
  int32_t units, reserved; /* reserved: 0 */
  int64_t near_bytes, desk_bytes, memory_bytes;
} tw_device;

/* A tensor of the caller. data NULL: not given. The last dimension is contiguous; strides are in elements. */
typedef struct tw_tensor {
  void* data;
  int32_t dtype, rank;
  int64_t shape[4], stride[4];
} tw_tensor;

/* Everything that tw_plan_run() reads and writes: tilewise::Arguments, with `dout` for do_. On a GPU nobody checks
 * what cu_seqlens holds: of a sequence that is longer than the problem's seqlen_q or seqlen_k rows may be left out. */
typedef struct tw_arguments {
  size_t struct_size;
  tw_tensor q, k, v, o, lse;
  tw_tensor cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink;
  tw_tensor dout, dlse, dq, dk, dv, dsink;
  /* tw_plan_workspace_bytes() bytes, aligned to 256, holding anything, and anything afterwards. Runs that follow one another may share it,
   * runs at the same time may not. */
  void* workspace;
} tw_arguments;

/* What tw_forward() and tw_backward() are told beside their tensors: tilewise::Options. */
typedef struct tw_options {
  size_t struct_size;
  const tw_device* device;   /* NULL: the CPU with all its threads */
  int32_t has_softmax_scale; /* 0: softmax_scale is not read, 1/sqrt(head_dim) is used */
  float softmax_scale, softcap;
  int32_t alignment;
  int64_t window_left, window_right;
  int32_t causal, deterministic;
  tw_tensor cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink;
  /* Packed: upper bounds; 0: read from cu_seqlens on a CPU, else the packed rows. Lengths beyond them are an error on a CPU; a GPU
   * does not look, and may leave rows out. */
  int64_t max_seqlen_q, max_seqlen_k;
  tw_tensor dlse, dsink;
  int32_t accumulate, reserved; /* reserved: 0 */
} tw_options;

/* A problem bound to a device and a kernel. Immutable: any number of threads may run it. */
typedef struct tw_plan tw_plan;

/* "0.1.0" */
TW_API const char* tw_version(void);

/* Why the last call of this thread that did not return TW_OK failed. Valid until the thread's next call that fails. */
TW_API const char* tw_last_error(void);

/* Sets defaults and struct_size. Pass sizeof the structure: it tells the library which version the caller was built with. */
TW_API void tw_problem_init(tw_problem* problem, size_t struct_size);
TW_API void tw_device_init(tw_device* device, size_t struct_size);
TW_API void tw_arguments_init(tw_arguments* arguments, size_t struct_size);
TW_API void tw_options_init(tw_options* options, size_t struct_size);

/* A tensor without gaps. rank is 1 to 4; anything else gives a tensor that every function refuses. */
TW_API tw_tensor tw_tensor_contiguous(void* data, int32_t dtype, int32_t rank, const int64_t* shape);

/* Reads the line of text that a problem prints: "fwd b2 q4096 k4096 h32/8 d128 bf16 causal". problem was initialised. */
TW_API tw_status tw_problem_parse(const char* text, tw_problem* problem);
/* Writes that line and a terminating 0 into buffer, cut to capacity bytes. *length, if not NULL, is the whole line's length. */
TW_API tw_status tw_problem_format(const tw_problem* problem, char* buffer, size_t capacity, size_t* length);
/* Whether any machine could run it. */
TW_API tw_status tw_problem_validate(const tw_problem* problem);

/* The CPU with that many threads; 0: OMP_NUM_THREADS, or every core that the process may use. device was initialised. */
TW_API tw_status tw_device_cpu(int32_t threads, tw_device* device);
TW_API tw_status tw_device_cuda(int32_t index, tw_device* device);

/* Chooses a kernel. device NULL: the CPU. *plan is NULL after an error; otherwise tw_plan_destroy() frees it. */
TW_API tw_status tw_plan_create(const tw_problem* problem, const tw_device* device, tw_plan** plan);
/* NULL is allowed. */
TW_API void tw_plan_destroy(tw_plan* plan);
/* Allocates nothing and never synchronises. stream: NULL on a CPU. On a GPU it may be captured into a CUDA graph: addresses (the
 * workspace's too), shapes and strides are then those of the capture; what the tensors hold may change from replay to replay,
 * cu_seqlens, seqused_k, alibi_slopes and sink included: only the GPU reads them. */
TW_API tw_status tw_plan_run(const tw_plan* plan, const tw_arguments* arguments, struct CUstream_st* stream);
/* What arguments.workspace must hold. 0 for NULL. */
TW_API size_t tw_plan_workspace_bytes(const tw_plan* plan);
/* The name of the kernel; it lives as long as the plan. "" for NULL. */
TW_API const char* tw_plan_kernel(const tw_plan* plan);

/* One call each: the problem follows from the tensors, the workspace is allocated, and the work is done on return.
 * lse of tw_forward() and options may be NULL. */
TW_API tw_status tw_forward(const tw_tensor* q, const tw_tensor* k, const tw_tensor* v, const tw_tensor* o, const tw_tensor* lse,
                            const tw_options* options);
TW_API tw_status tw_backward(const tw_tensor* dout, const tw_tensor* q, const tw_tensor* k, const tw_tensor* v, const tw_tensor* o,
                             const tw_tensor* lse, const tw_tensor* dq, const tw_tensor* dk, const tw_tensor* dv,
                             const tw_options* options);

#ifdef __cplusplus
}
#endif

#endif /* TILEWISE_TILEWISE_H */
