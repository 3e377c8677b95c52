// The command line as a user meets it: what each subcommand computes and prints, and that every mistake is one sentence
// on stderr, exit code 2 and no file.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "reference/attention.h"
#include "safetensors.h"
#include "tilewise/explain.hpp"
#include "tilewise/tilewise.hpp"

namespace tilewise {
namespace {

using Json = nlohmann::json;

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void store(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

struct Outcome {
  int code;
  std::string out, err;
};

class Tool : public testing::Test {
 protected:
  Tool() {
    std::string name = (std::filesystem::temp_directory_path() / "tilewise-XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~Tool() override { std::filesystem::remove_all(folder_); }

  std::string file(const std::string& name) const { return folder_ / name; }
  // Through the shell, in the test's own folder.
  Outcome shell(const std::string& command) const {
    const std::string line = "cd " + folder_.string() + " && (" + command + ") >stdout 2>stderr </dev/null";
    const int status = std::system(line.c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, contents(file("stdout")), contents(file("stderr"))};
  }
  Outcome tilewise(const std::string& arguments) const { return shell(TW_TOOL " " + arguments); }
  Json json(const std::string& arguments) const {
    const Outcome run = tilewise(arguments);
    EXPECT_EQ(run.code, 0) << run.err;
    return Json::parse(run.out);
  }

  void expect_refusal(const std::string& arguments, const std::string& sentence, int code = 2) const {
    const Outcome run = tilewise(arguments);
    EXPECT_EQ(run.code, code) << arguments;
    EXPECT_EQ(run.out, "") << arguments;
    EXPECT_NE(run.err.find(sentence), std::string::npos) << arguments << ": " << run.err;
    EXPECT_TRUE(run.err.starts_with("tilewise: ")) << run.err;
    EXPECT_EQ(std::count(run.err.begin(), run.err.end(), '\n'), 1) << run.err;
  }

 private:
  std::filesystem::path folder_;
};

// Contiguous tensors by name, to a file and to the library.
struct Tensors {
  struct One {
    DataType dtype;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
  };
  std::map<std::string, One> all;
  std::mt19937 random{1};

  int64_t count(const std::string& name) const {
    int64_t product = 1;
    for (const int64_t size : all.at(name).shape) product *= size;
    return product;
  }
  void add(const std::string& name, DataType dtype, std::vector<int64_t> shape) {
    all[name] = {dtype, std::move(shape), {}};
    all[name].bytes.resize(static_cast<size_t>(count(name) * reference::element_bytes(dtype)));
  }
  void draw(const std::string& name, DataType dtype, std::vector<int64_t> shape) {
    add(name, dtype, std::move(shape));
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < count(name); ++n) reference::write_element(all[name].bytes.data(), dtype, n, normal(random));
  }
  void integers(const std::string& name, const std::vector<int32_t>& values) {
    add(name, DataType::kInt32, {static_cast<int64_t>(values.size())});
    std::memcpy(all[name].bytes.data(), values.data(), values.size() * 4);
  }
  TensorView view(const std::string& name) {
    const auto found = all.find(name);
    if (found == all.end()) return {};
    TensorView view{.data = found->second.bytes.data(), .dtype = found->second.dtype, .rank = static_cast<int>(found->second.shape.size())};
    int64_t stride = 1;
    for (size_t d = found->second.shape.size(); d-- > 0;) {
      view.shape[d] = found->second.shape[d], view.stride[d] = stride;
      stride *= view.shape[d];
    }
    return view;
  }
  void write(const std::string& path) const {
    std::vector<safetensors::Output> outputs;
    for (const auto& [name, t] : all) {
      const char* dtype = t.dtype == DataType::kFloat32    ? "F32"
                          : t.dtype == DataType::kBFloat16 ? "BF16"
                          : t.dtype == DataType::kFloat16  ? "F16"
                                                           : "I32";
      outputs.push_back({name, dtype, t.shape, t.bytes.data(), t.bytes.size()});
    }
    safetensors::write(path, outputs, {}).check();
  }
};

Tensors dense(DataType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t heads, int64_t heads_kv, int64_t dim,
              int64_t dim_v) {
  Tensors t;
  t.draw("q", dtype, {batch, seqlen_q, heads, dim});
  t.draw("k", dtype, {batch, seqlen_k, heads_kv, dim});
  t.draw("v", dtype, {batch, seqlen_k, heads_kv, dim_v});
  return t;
}

void add_outputs(Tensors& t, bool gradients) {
  const bool packed = t.all.count("cu_seqlens_q");
  const auto q = t.all["q"].shape;
  auto o = q;
  o.back() = t.all["v"].shape.back();
  t.add("o", t.all["q"].dtype, o);
  t.add("lse", DataType::kFloat32, packed ? std::vector{q[1], q[0]} : std::vector{q[0], q[2], q[1]});
  for (const char* name : {"q", "k", "v"})
    if (gradients) t.add(std::string("d") + name, t.all[name].dtype, t.all[name].shape);
  if (gradients && t.all.count("sink")) t.add("dsink", DataType::kFloat32, t.all["sink"].shape);
}

// The library's own call on the tensors of the file; what the tool has written must be the same bits.
void expect_same_as_library(const std::string& path, Tensors& t, const Options& options, bool gradients) {
  add_outputs(t, gradients);
  Options o = options;
  o.device = Device::cpu(2);
  o.cu_seqlens_q = t.view("cu_seqlens_q"), o.cu_seqlens_k = t.view("cu_seqlens_k"), o.seqused_k = t.view("seqused_k");
  o.alibi_slopes = t.view("alibi_slopes"), o.sink = t.view("sink"), o.dlse = t.view("dlse"), o.dsink = t.view("dsink");
  ASSERT_EQ(forward(t.view("q"), t.view("k"), t.view("v"), t.view("o"), t.view("lse"), o).message(), "");
  if (gradients) {
    ASSERT_EQ(backward(t.view("do"), t.view("q"), t.view("k"), t.view("v"), t.view("o"), t.view("lse"), t.view("dq"), t.view("dk"),
                       t.view("dv"), o)
                  .message(),
              "");
  }
  const auto out = safetensors::File::open(path);
  ASSERT_TRUE(out.ok()) << out.status().message();
  EXPECT_EQ(out->header().tensors.size(), gradients ? (t.all.count("sink") ? 6u : 5u) : 2u);
  for (const auto& [name, entry] : out->header().tensors) {
    std::vector<std::byte> bytes(entry.end - entry.begin);
    ASSERT_TRUE(out->read(entry, bytes.data()).ok());
    EXPECT_EQ(entry.shape, t.all[name].shape) << name;
    EXPECT_TRUE(bytes == t.all[name].bytes) << name;
  }
}

TEST_F(Tool, AttendWritesTheLibrarysBitsAndWhatTheyAre) {
  Tensors t = dense(DataType::kFloat32, 2, 70, 90, 4, 2, 40, 24);
  t.draw("sink", DataType::kFloat32, {4});
  t.draw("alibi_slopes", DataType::kFloat32, {2, 4});
  t.integers("seqused_k", {90, 31});
  t.draw("do", DataType::kFloat32, {2, 70, 4, 24});
  t.draw("dlse", DataType::kFloat32, {2, 4, 70});
  t.write(file("in"));
  const Outcome run = tilewise("attend in -o out --window 50,3 --top-left --scale 0.2 --softcap 5 --threads 2");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.err, "");
  EXPECT_NE(run.out.find("wrote out: o lse dq dk dv dsink"), std::string::npos) << run.out;
  Options options;
  options.window_left = 50, options.window_right = 3, options.alignment = Alignment::kTopLeft;
  options.softmax_scale = 0.2f, options.softcap = 5;
  expect_same_as_library(file("out"), t, options, true);
  const auto metadata = safetensors::File::open(file("out"))->header().metadata;
  EXPECT_EQ(metadata.at("problem"), "bwd b2 q70 k90 h4/2 d40/24 fp32 window=50,3 topleft seqused scale=0.2 softcap=5 alibi sink");
  EXPECT_NE(metadata.at("kernel").find("forward"), std::string::npos);
  EXPECT_NE(metadata.at("kernel_backward").find("backward"), std::string::npos);
}

TEST_F(Tool, AttendTakesPackedSequences) {
  for (const DataType dtype : {DataType::kBFloat16, DataType::kFloat16}) {
    Tensors t;
    t.draw("q", dtype, {50, 6, 32});
    t.draw("k", dtype, {80, 3, 32});
    t.draw("v", dtype, {80, 3, 32});
    t.integers("cu_seqlens_q", {0, 20, 20, 50});
    t.integers("cu_seqlens_k", {0, 33, 60, 80});
    t.write(file("in"));
    ASSERT_EQ(tilewise("attend in -o out --causal --threads 2").code, 0);
    Options options;
    options.causal = true, options.max_seqlen_q = 30, options.max_seqlen_k = 33;
    expect_same_as_library(file("out"), t, options, false);
  }
}

TEST_F(Tool, AttendAgreesWithFloat64) {
  Tensors t = dense(DataType::kFloat32, 1, 65, 65, 2, 1, 64, 64);
  t.write(file("in"));
  ASSERT_EQ(tilewise("attend in -o out --causal").code, 0);
  Problem problem = *Problem::parse("q65 h2/1 d64 causal");
  Arguments arguments;
  arguments.q = t.view("q"), arguments.k = t.view("k"), arguments.v = t.view("v");
  const reference::Outputs exact = reference::attention(problem, arguments);
  const auto out = safetensors::File::open(file("out"));
  ASSERT_TRUE(out.ok());
  std::vector<float> o(exact.o.size());
  ASSERT_TRUE(out->read(out->header().tensors.at("o"), o.data()).ok());
  for (size_t n = 0; n < o.size(); ++n) ASSERT_NEAR(o[n], exact.o[n], 2e-6) << n;
}

TEST_F(Tool, ProgressOnATerminalChangesNoBit) {
  if (shell("script --version").code != 0) GTEST_SKIP() << "no script(1) to make a terminal with";
  Tensors t = dense(DataType::kFloat32, 3, 1200, 1200, 12, 4, 64, 64);
  t.draw("sink", DataType::kFloat32, {12});
  t.draw("alibi_slopes", DataType::kFloat32, {3, 12});
  t.draw("do", DataType::kFloat32, {3, 1200, 12, 64});
  t.write(file("in"));
  ASSERT_EQ(tilewise("attend in -o plain").code, 0);
  const Outcome run = shell("script -qec '" TW_TOOL " attend in -o watched' typescript");
  ASSERT_EQ(run.code, 0) << run.out;
  EXPECT_TRUE(contents(file("plain")) == contents(file("watched")));
}

// One head of one sequence, and packed sequences that share one head: only sequences or queries can be cut. A core at
// 200 GFLOP/s takes a second, and progress shows after half of one.
TEST_F(Tool, ProgressIsShownOnATerminal) {
  if (shell("script --version").code != 0) GTEST_SKIP() << "no script(1) to make a terminal with";
  Tensors one = dense(DataType::kFloat32, 1, 28000, 28000, 1, 1, 128, 128), packed;
  packed.draw("q", DataType::kFloat32, {24 * 2200, 4, 128});
  for (const char* name : {"k", "v"}) packed.draw(name, DataType::kFloat32, {24 * 2200, 1, 128});
  std::vector<int32_t> starts;
  for (int32_t n = 0; n <= 24; ++n) starts.push_back(2200 * n);
  packed.integers("cu_seqlens_q", starts), packed.integers("cu_seqlens_k", starts);
  for (const Tensors* t : {&one, &packed}) {
    t->write(file("in"));
    const std::string command = t == &one ? " attend in -o out --threads 1 --causal" : " attend in -o out --threads 1";
    const Outcome run = shell("script -qec '" TW_TOOL + command + "' typescript");
    ASSERT_EQ(run.code, 0) << run.out;
    std::vector<int> shares;
    for (size_t at = 0; (at = run.out.find("\rforward ", at)) != run.out.npos;) {
      at += std::strlen("\rforward ");
      shares.push_back(std::atoi(run.out.c_str() + at));
    }
    ASSERT_GE(shares.size(), 3u) << run.out;
    EXPECT_TRUE(std::is_sorted(shares.begin(), shares.end())) << run.out;
    EXPECT_GT(shares.back(), 50) << run.out;
    EXPECT_LE(shares.back(), 100) << run.out;
  }
}

TEST_F(Tool, AttendRefusesBadInputsAndWritesNothing) {
  const auto refuse = [&](const Tensors& t, const std::string& sentence, const std::string& options = "") {
    t.write(file("in"));
    expect_refusal("attend in -o out " + options, sentence);
    EXPECT_FALSE(std::filesystem::exists(file("out"))) << sentence;
  };
  const Tensors good = dense(DataType::kFloat32, 2, 8, 8, 2, 2, 16, 16);
  const auto with = [&](const std::string& name, DataType dtype, std::vector<int64_t> shape) {
    Tensors t = good;
    t.draw(name, dtype, std::move(shape));
    return t;
  };
  constexpr DataType f32 = DataType::kFloat32, f16 = DataType::kFloat16;
  Tensors no_k = good;
  no_k.all.erase("k");
  refuse(no_k, "the input has no tensor \"k\"");
  refuse(with("k", f16, {2, 8, 2, 16}), "tensor \"k\" is F16, it must be F32");
  refuse(with("k", f32, {1, 8, 2, 16}), "tensor \"k\" has shape [1, 8, 2, 16], it must be [2, 8, 2, 16]");
  refuse(with("v", f32, {2, 7, 2, 16}), "tensor \"v\" has shape [2, 7, 2, 16], it must be [2, 8, 2, 16]");
  refuse(with("q", f32, {2, 8, 3, 16}), "num_heads_q 3 is not a multiple of num_heads_kv 2");
  refuse(with("q", f32, {16, 2, 16}), "tensor \"q\" has 3 dimensions, it must have 4");
  refuse(with("do", f32, {2, 8, 2, 8}), "tensor \"do\" has shape");
  refuse(with("sink", f16, {2}), "tensor \"sink\" is F16, it must be F32");
  refuse(with("seqused_k", f32, {2}), "tensor \"seqused_k\" is F32, it must be I32");
  refuse(with("q", f32, {2, 8, 2, 600}), "head_dim 600");
  Tensors wrong = good;
  wrong.integers("q", {1});
  refuse(wrong, "tensor \"q\" is I32, it must be F32, BF16 or F16");
  refuse(good, "token 'window=3' needs two numbers", "--window 3");
  refuse(good, "--window 3,5 contradicts --causal", "--window 3,5 --causal");
  refuse(good, "softcap -1 is negative", "--softcap -1");

  Tensors packed;
  for (const char* name : {"q", "k", "v"}) packed.draw(name, f32, {10, 2, 16});
  packed.integers("cu_seqlens_q", {0, 4, 10});
  refuse(packed, "the input has no tensor \"cu_seqlens_k\"");
  const auto sequences = [&](const std::vector<int32_t>& values) {
    Tensors t = packed;
    t.integers("cu_seqlens_k", values);
    return t;
  };
  refuse(sequences({0, 10}), "tensor \"cu_seqlens_k\" has shape [2], it must be [3]");
  refuse(sequences({1, 4, 10}), "cu_seqlens_k[0] is 1, it must be 0");
  refuse(sequences({0, 5, 4}), "cu_seqlens_k[2] is 4, less than the 5 before it");
  refuse(sequences({0, 5, 11}), "cu_seqlens_k ends with 11, but there are 10 rows");
  refuse(sequences({0, -2147483648, 10}), "less than the 0 before it");
}

TEST_F(Tool, AttendRefusesBadFilesAndKeepsTheOldOutput) {
  dense(DataType::kFloat32, 1, 8, 8, 2, 2, 16, 16).write(file("in"));
  store(file("out"), "old");
  const std::string bytes = contents(file("in"));
  const auto refuse = [&](const std::string& changed, const std::string& sentence) {
    store(file("bad"), changed);
    expect_refusal("attend bad -o out", sentence);
    EXPECT_EQ(contents(file("out")), "old") << sentence;
  };
  refuse(bytes.substr(0, 5), "bad: truncated: 5 bytes");
  refuse(bytes.substr(0, 100), "bad: truncated: a header of");
  refuse(bytes.substr(0, bytes.size() - 1), "bad: tensor \"v\" lies at bytes");
  refuse(bytes + "x", "bad: no tensor owns the last 1 bytes");
  refuse(std::string("\0\xe1\xf5\x05\x01\0\0\0", 8) + bytes, "the limit is 100000000");
  refuse(std::string("\x02\0\0\0\0\0\0\0[]", 10), "the header does not begin with {");
  std::string twice = bytes;
  twice.replace(twice.find("\"k\":"), 3, "\"q\"");
  refuse(twice, "tensor \"q\" is given twice");
  expect_refusal("attend in -o in", "output 'in' is the input file");
  EXPECT_EQ(contents(file("in")), bytes);
  expect_refusal("attend none -o out", "none: No such file or directory");
  expect_refusal("attend . -o out", ".: not a regular file");
  expect_refusal("attend in -o no/out", "no/out cannot be written: No such file or directory");
  expect_refusal("attend in -o /dev/null", "/dev/null cannot be written: not a regular file");
  // 1024 bytes: with less, libomp leaves an empty file in /dev/shm, and whoever gets that process's number later dies of a bus error.
  const Outcome full = shell("(trap '' XFSZ; ulimit -f 2; " TW_TOOL " attend in -o out 2>&1) | cat");
  EXPECT_NE(full.out.find("tilewise: out cannot be written: File too large"), std::string::npos) << full.out;
  EXPECT_EQ(contents(file("out")), "old");
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(file("out")).parent_path()))
    EXPECT_EQ(entry.path().filename().string().find(".part"), std::string::npos) << full.out;
}

TEST_F(Tool, BenchKnowsBeforeItRunsWhereItsFiguresCannotGo) {
  expect_refusal("bench q8 d8 --json no/figures", "no/figures cannot be written: No such file or directory");
  expect_refusal("bench q8 d8 --json .", ". cannot be written: not a regular file");
  store(file("figures"), "old");
  const Outcome full = shell("(trap '' XFSZ; ulimit -f 2; " TW_TOOL " bench q64 d8 --rounds 1 --seconds 0 --json figures 2>&1) | cat");
  EXPECT_NE(full.out.find("tilewise: figures cannot be written: File too large"), std::string::npos) << full.out;
  EXPECT_EQ(contents(file("figures")), "old");
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(file("figures")).parent_path()))
    EXPECT_EQ(entry.path().filename().string().find(".part"), std::string::npos);
}

TEST_F(Tool, AStdoutThatTakesNothingIsAFailure) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  for (const char* arguments : {"devices --json", "explain q8 d8", "--version", "attend --help"}) {
    const Outcome run = shell(std::string(TW_TOOL " ") + arguments + " >/dev/full");
    EXPECT_EQ(run.code, 2) << arguments;
    EXPECT_TRUE(run.err.starts_with("tilewise: ")) << arguments << run.err;
    EXPECT_EQ(std::count(run.err.begin(), run.err.end(), '\n'), 1) << run.err;
  }
}

TEST_F(Tool, WhatDoesNotFitIsRefusedBeforeItIsTaken) {
  expect_refusal("bench q1 k1000000000 h64 d512 --json -", "'fwd b1 q1 k1000000000 h64 d512 fp32' needs 477 TiB of memory, ", 3);
  expect_refusal("verify q1 k1000000000 h64 d512", "verifying 'fwd b1 q1 k1000000000 h64 d512 fp32' needs ", 3);
  // q, k and v without bytes on the disk.
  const std::string shape = R"("dtype":"F32","shape":[1,200000000,8,128],"data_offsets":)";
  const int64_t bytes = 200000000LL * 8 * 128 * 4;
  std::string header = "{";
  for (int64_t n = 0; n < 3; ++n)
    header += std::string(n ? "," : "") + '"' + "qkv"[n] + "\":{" + shape + "[" + std::to_string(n * bytes) + "," +
              std::to_string((n + 1) * bytes) + "]}";
  header += "}";
  header.resize(512, ' ');
  store(file("in"), std::string("\0\2\0\0\0\0\0\0", 8) + header);
  std::error_code error;
  std::filesystem::resize_file(file("in"), static_cast<uintmax_t>(520 + 3 * bytes), error);
  if (error) GTEST_SKIP() << "no file of 2.4 TB here: " << error.message();
  expect_refusal("attend in -o out", "in needs 2.99 TiB of memory, ", 3);
}

TEST_F(Tool, VerifySaysWhatFloat64WouldTakeTooLongFor) {
  const Outcome run = shell("OMP_NUM_THREADS=2 " TW_TOOL " verify q300000 d64");
  EXPECT_EQ(run.code, 2);
  EXPECT_NE(run.err.find(" minutes; --long does it all the same"), std::string::npos) << run.err;
}

TEST_F(Tool, UsageErrorsAreOneSentence) {
  expect_refusal("", "a command is missing");
  for (const char* line : {"frobnicate", "explian q5", "--colour"})
    expect_refusal(line, std::string(line).substr(0, std::string(line).find(' ')));
  expect_refusal("explian q5", "'explian' is no command: attend, bench, verify, explain or devices");
  expect_refusal("attend", "input is required");
  expect_refusal("attend in", "--output is required");
  expect_refusal("bench", "problem is required");
  expect_refusal("bench q8 d8 --peers nobody", "--peers");
  expect_refusal("bench q8 d8 --threads 0", "--threads");
  expect_refusal("bench \"q8 d8\" \"b0 q8 d8\"", "'fwd b0 q8 k8 h1 d8 fp32' has no work to time");
  expect_refusal("explain q8 d8 --colour", "--colour");
  expect_refusal("explain q8", "the problem has no d");
  expect_refusal("explain q8 d8 h3/2", "num_heads_q 3 is not a multiple of num_heads_kv 2");
  expect_refusal("explain \"q8 d8\" \"q9 d9\"", "explain takes one PROBLEM, not 2");
  expect_refusal("explain q8 d513", "head_dim 513");
  expect_refusal("bench @none", "none: cannot be read");
  store(file("problems"), "# comment\n\nq8 d8\nq8 dx\n");
  expect_refusal("bench @problems", "problems:4: ");
  store(file("problems"), "# nothing\n");
  expect_refusal("verify @problems", "problems: holds no problem");
  expect_refusal("verify", "verify needs a PROBLEM");
  expect_refusal("verify q8 d8 --layout round", "layout 'round'");
  if (!Device::cuda().ok()) expect_refusal("explain q8 d8 --device cuda", "CUDA", 3);
  expect_refusal("bench q8 d8 --device h200",
                 "--device: h200 is for explain only, which plans by its data sheet: bench runs on cpu or cuda");
  expect_refusal("verify q8 d8 --device h100", "--device: h100 is for explain only");
  expect_refusal("bench q8 d8 --device gpu", "--device: gpu not in {cpu,cuda}");
  expect_refusal("explain q8 d8 --device gpu", "--device: gpu not in {cpu,cuda,h100,h200}");
}

TEST_F(Tool, HelpAndVersion) {
  EXPECT_EQ(tilewise("--version").code, 0);
  EXPECT_TRUE(tilewise("--version").out.starts_with("tilewise "));
  for (const char* word : {" bwd ", " topleft ", " window=L,R ", " packed tqN tkN ", " seqused ", " softcap=X ", " accumulate "})
    EXPECT_NE(tilewise("--help").out.find(word), std::string::npos) << word;
  for (const char* command : {"attend", "bench", "verify", "explain", "devices"}) {
    EXPECT_NE(tilewise("--help").out.find(std::string("  ") + command), std::string::npos);
    const Outcome run = tilewise(std::string(command) + " --help");
    EXPECT_EQ(run.code, 0);
    EXPECT_NE(run.out.find(std::string("Example: tilewise ") + command), std::string::npos) << run.out;
  }
}

TEST_F(Tool, VerifyJudgesProblemsAndFiles) {
  store(file("problems"), "q33 h2 d16 causal  # a comment\nq5 k40 h4/2 d8 bf16\n");
  const Outcome run = tilewise("verify @problems \"q20 d8\" --layout permuted --seed 3");
  EXPECT_EQ(run.code, 0) << run.out << run.err;
  EXPECT_NE(run.out.find("3 of 3 problems agree with float64"), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("fwd b1 q5 k40 h4/2 d8 bf16\n"), std::string::npos) << run.out;
  const Outcome drawn = tilewise("verify --fuzz 5 --seed 2");
  EXPECT_EQ(drawn.code, 0) << drawn.out << drawn.err;
  EXPECT_NE(drawn.out.find("5 of 5 problems agree"), std::string::npos) << drawn.out;
}

TEST_F(Tool, BenchMeasuresTimeMemoryAndError) {
  const Json report =
      json("bench --json - --peers standard --error --rounds 4 --seconds 0 --threads 2 \"q700 h4 d32\" \"bwd q300 h4/2 d32 bf16 causal\"");
  EXPECT_EQ(report["device"]["units"], 2);
  ASSERT_EQ(report["results"].size(), 2u);
  EXPECT_EQ(report["results"][0]["flops"], 4.0 * 700 * 700 * 4 * 32);
  EXPECT_EQ(report["results"][1]["flops"], 10.0 * 300 * 301 / 2 * 4 * 32);
  for (const Json& row : report["results"]) {
    ASSERT_EQ(row["contenders"].size(), 2u);
    const Json &ours = row["contenders"][0], &standard = row["contenders"][1];
    EXPECT_EQ(ours["name"], "tilewise");
    EXPECT_EQ(standard["name"], "standard");
    for (const Json& c : row["contenders"]) {
      EXPECT_GT(c["seconds"]["min"], 0.0);
      EXPECT_LE(c["seconds"]["min"], c["seconds"]["median"]);
      EXPECT_LE(c["seconds"]["median"], c["seconds"]["max"]);
      EXPECT_EQ(c["seconds"]["turns"], 4);
      EXPECT_GT(c["roofline_share"], 0.0);
      EXPECT_NEAR(c["flops_per_second"].get<double>() * c["seconds"]["median"].get<double>(), row["flops"].get<double>(), 1);
      EXPECT_GT(c["max_error"], 0.0);
      EXPECT_LT(c["max_error"], row["pass"] == "forward" ? 1e-5 : 1e-1);
    }
    if (ours["extra_bytes"].is_null()) continue;  // a kernel that does not tell the peak of memory
    const double slack = 3e6;                     // counters of resident pages lag by thread
    EXPECT_NEAR(ours["extra_bytes"].get<double>(), row["planned_extra_bytes"].get<double>(), slack);
    EXPECT_GT(standard["extra_bytes"].get<double>(), 0.6 * row["standard_extra_bytes"].get<double>());
  }
  // Forward: S of 4 heads, 7.8 MB.
  const Json& standard_extra = report["results"][0]["contenders"][1]["extra_bytes"];
  EXPECT_TRUE(standard_extra.is_null() || standard_extra > 7e6) << standard_extra;
}

// Gradients that every call adds to: float32 whatever the type, and no matter for the forward run.
TEST_F(Tool, BenchTakesAccumulate) {
  const Json report = json(
      "bench --json - --peers standard --error --rounds 2 --seconds 0 \"bwd q200 h4/2 d32 accumulate\" \"bwd q200 d32 bf16 accumulate\"");
  for (const Json& row : report["results"]) {
    for (const Json& c : row["contenders"]) {
      EXPECT_GT(c["max_error"], 0.0);
      EXPECT_LT(c["max_error"], 1e-2) << row;
    }
  }
}

TEST_F(Tool, BenchKeepsWhatItMeasuredBeforeAFailure) {
  const Outcome run = tilewise("bench --rounds 1 --seconds 0 --json figures \"q64 d8\" \"q1 k1000000000 h64 d512\"");
  EXPECT_EQ(run.code, 3);
  EXPECT_NE(run.err.find("needs 477 TiB of memory"), std::string::npos) << run.err;
  const Json report = Json::parse(contents(file("figures")));
  ASSERT_EQ(report["results"].size(), 1u);
  EXPECT_EQ(report["results"][0]["problem"], "fwd b1 q64 k64 h1 d8 fp32");
  EXPECT_NE(report["failure"].get<std::string>().find("needs 477 TiB of memory"), std::string::npos) << report["failure"];
}

TEST_F(Tool, BenchSaysHowMuchStandardAttentionWouldNeed) {
  const Outcome run = tilewise("bench --peers standard --rounds 1 --seconds 0 --json figures q2000000 d8 window=0,0");
  ASSERT_EQ(run.code, 0) << run.err;
  EXPECT_NE(run.out.find("standard does not fit: it needs 14.6 TiB"), std::string::npos) << run.out;
  const Json report = Json::parse(contents(file("figures")));
  EXPECT_EQ(report["results"][0]["contenders"][1]["needed_bytes"], 4.0 * 2e6 * 2e6);
}

// The limit is of the useful work and its least traffic, the prediction of what the plan computes and moves.
TEST_F(Tool, ExplainTimesFollowFromTheirParts) {
  for (const char* problem :
       {"bwd b2 q300 k400 h8/2 d192/128 bf16 window=10,0 topleft packed tq500 tk700", "q2000 h2 d64", "bwd q1 k3000 d64"}) {
    const Json plan = json(std::string("explain --json ") + problem), &flash = plan["flash"];
    EXPECT_EQ(flash["limit_seconds"], std::max(flash["arithmetic_seconds"].get<double>(), flash["memory_seconds"].get<double>()))
        << problem;
    EXPECT_EQ(flash["predicted_seconds"], std::max(flash["tiles_seconds"].get<double>(), flash["traffic_seconds"].get<double>()))
        << problem;
    EXPECT_LE(flash["arithmetic_seconds"], flash["tiles_seconds"]) << problem;
    EXPECT_LE(flash["memory_seconds"], flash["traffic_seconds"]) << problem;
    EXPECT_LE(flash["least_bytes"], flash["bytes_moved"]) << problem;
  }
}

TEST_F(Tool, ThreadsOfTheEnvironmentAreCapped) {
  const Outcome run = shell("OMP_NUM_THREADS=5000 " TW_TOOL " attend --help && OMP_NUM_THREADS=5000 " TW_TOOL " explain --json q64 d8");
  EXPECT_EQ(run.code, 0) << run.err;
  const std::string sentence = "Device::cpu(4096): threads 4096 is above ";
  expect_refusal("explain q64 d8 --threads 4096", sentence);
}

TEST_F(Tool, ExplainDrawsTheTilesThatItCounts) {
  for (const char* problem : {"q700 k900 h2 d64", "q700 k900 h4/2 d64 causal b3", "q900 k700 h2/2 d32 causal topleft",
                              "q1500 h2/1 d64 window=200,100", "q500 k1500 h1 d128 window=-1,300 topleft", "q64 d8 window=0,0"}) {
    const Json plan = json(std::string("explain --json --threads 2 ") + problem);
    ASSERT_EQ(plan["picture"]["tiles_down"], 1) << problem;
    ASSERT_EQ(plan["picture"]["tiles_across"], 1) << problem;
    std::map<char, int64_t> signs;
    for (const Json& line : plan["picture"]["rows"])
      for (const char sign : line.get<std::string>()) ++signs[sign];
    const Problem p = *Problem::parse(problem);
    const int64_t groups = p.batch * p.num_heads_kv;
    EXPECT_EQ(signs['#'] * groups, plan["tiles"]["full"]) << problem;
    EXPECT_EQ(signs['+'] * groups, plan["tiles"]["masked"]) << problem;
    EXPECT_EQ(signs['.'] * groups, plan["tiles"]["skipped"]) << problem;
    EXPECT_EQ(plan["flops"], explain(p)->flops) << problem;
    EXPECT_GE(plan["flash"]["predicted_seconds"], plan["flash"]["limit_seconds"]);
    EXPECT_GT(plan["flash"]["limit_seconds"], 0.0);
  }
}

TEST_F(Tool, ExplainDrawsManyTilesAsCells) {
  const auto rows_of = [&](const std::string& problem) {
    const Json plan = json("explain --json " + problem);
    EXPECT_GT(plan["picture"]["tiles_down"], 1) << problem;
    EXPECT_GT(plan["picture"]["tiles_across"], 1) << problem;
    std::vector<std::string> rows = plan["picture"]["rows"];
    EXPECT_LE(rows.size(), 16u) << problem;
    for (const std::string& row : rows) {
      EXPECT_EQ(row.size(), rows[0].size()) << problem;
      EXPECT_LE(row.size(), 64u) << problem;
      EXPECT_GE(row.size(), 32u) << problem;
    }
    return rows;
  };
  for (const std::string& row : rows_of("q128000 d64")) EXPECT_EQ(row.find_first_not_of('#'), std::string::npos) << row;
  size_t before = 0;  // the stairs of a causal mask
  for (const std::string& row : rows_of("q128000 d64 causal")) {
    const size_t full = row.find_first_not_of('#'), touched = row.find('.');
    EXPECT_GE(full, before) << row;
    EXPECT_EQ(row.find_first_not_of('+', full), touched) << row;
    EXPECT_EQ(touched == row.npos ? row.npos : row.find_first_not_of('.', touched), row.npos) << row;
    before = full;
  }
  EXPECT_GT(before, 32u);
}

TEST_F(Tool, ExplainEndsForAnyProblem) {
  expect_refusal("explain q1000000000 h1000000/1 d1", "blocks of rows, and explain counts no more than");
  const Problem packed = *Problem::parse("packed b1000000000 q3 k5 tq1000000000 tk70 h2 d8");
  const auto e = explain(packed);
  ASSERT_TRUE(e.ok()) << e.status().message();
  EXPECT_EQ(e->flops, 4.0 * 2 * 8 * 14 * 3 * 5);  // 14 sequences have keys
  EXPECT_EQ(e->work_items, 2 * 333333334);
}

void expect_lines_of_80_columns(const std::string& text) {
  const auto columns = [](const std::string& line) {  // of UTF-8
    return std::count_if(line.begin(), line.end(), [](char c) { return (c & 0xc0) != 0x80; });
  };
  std::string line;
  for (std::istringstream lines(text); std::getline(lines, line);) EXPECT_LE(columns(line), 80) << line;
}

TEST_F(Tool, ExplainListsEveryCandidate) {
  const Outcome run = tilewise("explain q4096 h8 d64 causal");
  ASSERT_EQ(run.code, 0) << run.err;
  for (const Candidate& candidate : Plan::candidates(*Problem::parse("q4096 h8 d64 causal")))
    EXPECT_NE(run.out.find(candidate.name), std::string::npos) << candidate.name << run.out;
  expect_lines_of_80_columns(run.out);
  const Outcome longest =
      tilewise("explain bwd b2 q100 k200 h4/2 d64 window=50,3 topleft packed tq200 tk400 softcap=5 alibi sink accumulate");
  ASSERT_EQ(longest.code, 0) << longest.err;
  expect_lines_of_80_columns(longest.out);
}

// GPUs are planned for wherever this runs, at their data sheets' rates; where the build has no kernels for them it says so.
TEST_F(Tool, ExplainPlansForGpusThatAreNotHere) {
  Device gpu;
  gpu.type = DeviceType::kCuda;
  if (Plan::candidates(*Problem::parse("q8 d8"), gpu).empty()) {
    expect_refusal("explain q8 d8 bf16 --device h200", "this build has no CUDA: configure with -DTILEWISE_CUDA=ON");
    return;
  }
  for (const char* pass : {"fwd", "bwd"}) {
    const Json plan = json(std::string("explain --json --device h200 b4 q4096 h16 d128 bf16 causal ") + pass);
    EXPECT_EQ(plan["device"]["units"], 132);
    EXPECT_EQ(plan["rates"]["source"], "data sheet");
    EXPECT_EQ(plan["flash"]["memory_seconds"], plan["flash"]["least_bytes"].get<double>() / 4.8e12);
    EXPECT_LE(plan["tiles"]["desk_bytes"], plan["device"]["desk_bytes"]);
  }
  // Tiles are of one query head, head dimension 72 costs as much as 96, and where there are 128 blocks four SMs of 132 have nothing to do.
  for (const auto& [pass, products] : {std::pair("fwd", 4.0), {"bwd", 10.0}}) {
    const Json plan = json(std::string("explain --json --device h200 q4096 h16/4 d72 bf16 causal ") + pass), &tiles = plan["tiles"];
    const double area = tiles["block_m"].get<double>() * tiles["block_n"].get<double>();
    const double computed = (tiles["full"].get<double>() + tiles["masked"].get<double>()) * area * products * 96;
    const double idle = std::max(1., 132 / tiles["work_items"].get<double>());
    EXPECT_NEAR(plan["flash"]["tiles_seconds"].get<double>() / (idle * computed / 989.4e12), 1, 1e-12) << pass;
    EXPECT_GT(plan["flash"]["tiles_seconds"], 96.0 / 72 * plan["flash"]["arithmetic_seconds"].get<double>()) << pass;
  }
  // One query takes 64 rows of one SM's 132.
  const Json one = json("explain --json --device h200 q1 k4096 h1 d128 bf16");
  EXPECT_NEAR(one["flash"]["tiles_seconds"].get<double>(), 132. * 64 * 4096 * 512 / 989.4e12, 1e-12);
  const Outcome text = tilewise("explain --device h200 q4096 h16 d64 bf16");
  expect_lines_of_80_columns(text.out);
  // A reason that many kernels share is one line, but JSON has them all.
  std::map<std::string, int> refusals;
  const Json all = json("explain --json --device h200 q4096 h16 d64 bf16")["candidates"];
  for (const Json& candidate : all) ++refusals[candidate["refusal"]];
  EXPECT_GT(all.size(), 20u);
  ASSERT_GT(refusals["takes fp16 only"], 3);
  EXPECT_NE(text.out.find("            " + std::to_string(refusals["takes fp16 only"]) + " kernels: each takes fp16 only\n"),
            std::string::npos)
      << text.out;
  EXPECT_EQ(text.out.find("fp16_d64"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("forward_sm90_bf16_d64_short: is for dense tensors of 0 to 1536\n              queries, "), std::string::npos)
      << text.out;
  EXPECT_NE(text.out.find("FLOP/byte; this GPU balances at 206.1"), std::string::npos) << text.out;
  EXPECT_NE(text.out.find("\nat best "), std::string::npos) << text.out;
  EXPECT_EQ(text.out.find("filled"), std::string::npos) << text.out;
  // What the kernel fills up it also multiplies.
  const Outcome filled = tilewise("explain --device h200 bwd q4096 h16 d136/80 bf16");
  expect_lines_of_80_columns(filled.out);
  EXPECT_NE(filled.out.find("            head_dim 136/80 filled up to 192/128 with zeros\n"), std::string::npos) << filled.out;
  EXPECT_NE(filled.out.find("bound, filled tiles in full"), std::string::npos) << filled.out;
  const Outcome packed = tilewise("explain --device h200 bwd b3 q900 h2 d64 bf16 packed tq1000 tk1000 causal deterministic");
  expect_lines_of_80_columns(packed.out);
  for (const char* said : {"            lengths are data: ", "            deterministic: CTAs take turns"})
    EXPECT_NE(packed.out.find(said), std::string::npos) << packed.out;
  EXPECT_EQ(filled.out.find("lengths are data"), std::string::npos) << filled.out;
  EXPECT_EQ(filled.out.find("deterministic"), std::string::npos) << filled.out;
  expect_refusal("explain q8 d8 --device h100", "dtype fp32 is neither bf16 nor fp16");
}

TEST_F(Tool, DevicesHaveSizesAndRates) {
  const Json devices = json("devices --json");
  ASSERT_GE(devices.size(), 1u);
  EXPECT_EQ(devices[0]["type"], "cpu");
  for (const Json& device : devices) {
    for (const char* field : {"units", "near_bytes", "desk_bytes", "memory_bytes"}) EXPECT_GT(device[field], 0) << field;
    for (const char* dtype : {"fp32", "bf16", "fp16"}) EXPECT_GT(device["rates"][dtype]["flops_per_second"], 1e8) << dtype;
  }
}

}  // namespace
}  // namespace tilewise
