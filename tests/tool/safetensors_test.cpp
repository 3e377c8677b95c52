// The reader against hand-made bytes, one broken rule at a time; the writer's promise: whole or not at all.
#include "safetensors.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace tilewise::safetensors {
namespace {

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "tilewise-XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string file(const std::string& name) const { return path_ / name; }
  size_t count() const { return std::distance(std::filesystem::directory_iterator(path_), {}); }

 private:
  std::filesystem::path path_;
};

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void store(const std::string& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }

std::string with_length(const std::string& json, const std::string& data) {
  std::string bytes;
  for (int shift = 0; shift < 64; shift += 8) bytes += static_cast<char>(static_cast<uint64_t>(json.size()) >> shift & 0xff);
  return bytes + json + data;
}

TEST(Safetensors, ReadsEveryFieldOfAFileWhoseTensorsAreNotAligned) {
  const Folder folder;
  const std::string path = folder.file("in");
  const std::string json =
      R"({"b":{"dtype":"I32","shape":[2],"data_offsets":[3,11]},"__metadata__":{"x":"y"},)"
      R"("a":{"dtype":"U8","shape":[1,3],"data_offsets":[0,3]},"e":{"dtype":"F16","shape":[0,7],"data_offsets":[3,3]}} )";
  store(path, with_length(json, std::string("abc\x01\0\0\0\xff\xff\xff\xff", 11)));
  const Result<File> file = File::open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->header().metadata, (Metadata{{"x", "y"}}));
  ASSERT_EQ(file->header().tensors.size(), 3u);
  const Entry& b = file->header().tensors.at("b");
  EXPECT_EQ(b.dtype, "I32");
  EXPECT_EQ(b.shape, (std::vector<int64_t>{2}));
  int32_t values[2];
  ASSERT_TRUE(file->read(b, values).ok());
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], -1);
  EXPECT_EQ(file->header().tensors.at("e").shape, (std::vector<int64_t>{0, 7}));
}

struct BadHeader {
  const char* name;
  std::string json;
  const char* sentence;
};

TEST(Safetensors, RefusesBadHeadersEachWithItsOwnSentence) {
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"q":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  const std::string good = R"("q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const std::vector<BadHeader> cases = {
      {"no JSON", "{\"q\"", "the header is not JSON at its byte"},
      {"an array", "[1]", "the header does not begin with {"},
      {"text after it", "{" + good + "} x", "the header is not JSON"},
      {"invalid UTF-8", "{\"\xff\":1}", "the header is not JSON"},
      {"a name twice", "{" + good + "," + good + "}", "tensor \"q\" is given twice"},
      {"a field twice", R"({"q":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "tensor \"q\" has dtype twice"},
      {"metadata twice", R"({"__metadata__":{},"__metadata__":{}})", "tensor \"__metadata__\" is given twice"},
      {"metadata that is no string", R"({"__metadata__":{"a":1}})", "has a \"a\" of the wrong kind"},
      {"an unknown field", R"({"q":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", "has the unknown field \"x\""},
      {"no dtype", R"({"q":{"shape":[2],"data_offsets":[0,8]}})", "tensor \"q\" has no dtype"},
      {"no shape", R"({"q":{"dtype":"F32","data_offsets":[0,8]}})", "tensor \"q\" has no shape"},
      {"no offsets", R"({"q":{"dtype":"F32","shape":[2]}})", "tensor \"q\" has no data_offsets"},
      {"one offset", tensor("F32", "[2]", "[8]"), "needs two data_offsets"},
      {"three offsets", tensor("F32", "[2]", "[0,8,8]"), "needs two data_offsets"},
      {"nine dimensions", tensor("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), "tensor \"q\" has more than 8 dimensions"},
      {"an unknown dtype", tensor("F31", "[2]", "[0,8]"), "has the unknown dtype \"F31\""},
      {"a negative shape", tensor("F32", "[-2]", "[0,8]"), "has shape -2, less than 0"},
      {"a fraction", tensor("F32", "[2.0]", "[0,8]"), "has a shape that is no 64-bit integer"},
      {"a shape above 2^63", tensor("F32", "[9223372036854775808]", "[0,8]"), "more than 2^63 - 1"},
      {"a shape above 2^64", tensor("F32", "[18446744073709551616]", "[0,8]"), "no 64-bit integer"},
      {"a shape of text", tensor("F32", R"(["2"])", "[0,8]"), "has a shape of the wrong kind"},
      {"a nested shape", tensor("F32", "[[2]]", "[0,8]"), "has a shape of the wrong kind"},
      {"a product that overflows", tensor("F32", "[4294967296,4294967296]", "[0,8]"), "a shape of more than 2^64 bytes"},
      {"a size that is not the shape's", tensor("F32", "[3]", "[0,8]"), "has 8 bytes, but its shape and dtype F32 need 12"},
      {"an end outside", tensor("F32", "[3]", "[0,12]"), "outside the 8 bytes"},
      {"an end before its begin", tensor("F32", "[2]", "[8,0]"), "outside the 8 bytes"},
      {"an overlap", R"({"q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"k":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       "overlaps another tensor"},
      {"a hole", tensor("F32", "[1]", "[4,8]"), "no tensor owns the 4 bytes before \"q\""},
      {"a rest", tensor("F32", "[1]", "[0,4]"), "no tensor owns the last 4 bytes"},
      {"a tensor that is a number", R"({"q":1})", "is not described by a JSON object"},
      {"a deep object", R"({"q":{"dtype":{"a":1}}})", "nests deeper"},
      {"a control character in a name", R"({"\u001b[2J":1})", R"(tensor "\u001b[2J" is)"},
  };
  for (const BadHeader& bad : cases) {
    const auto header = parse_header(bad.json, 8);
    ASSERT_FALSE(header.ok()) << bad.name;
    EXPECT_NE(header.status().message().find(bad.sentence), std::string::npos) << bad.name << ": " << header.status().message();
  }
  EXPECT_TRUE(parse_header("{" + good + "}", 8).ok());
  EXPECT_TRUE(parse_header(tensor("F32", "[1,1,1,1,1,1,1,2]", "[0,8]"), 8).ok());
}

TEST(Safetensors, ReadsDeepNestingWithoutRecursion) { EXPECT_FALSE(parse_header("{\"q\":" + std::string(50'000'000, '['), 0).ok()); }

TEST(Safetensors, RefusesFilesThatAreNoFilesOrTooShort) {
  const Folder folder;
  const auto sentence = [&](const std::string& bytes) {
    store(folder.file("in"), bytes);
    return File::open(folder.file("in")).status().message();
  };
  EXPECT_NE(sentence("").find("truncated: 0 bytes"), std::string::npos);
  EXPECT_NE(sentence(std::string("\x10\0\0\0\0\0\0\0{}", 10)).find("truncated: a header of 16 bytes in a file of 10"), std::string::npos);
  EXPECT_NE(sentence(std::string(8, '\xff')).find("a header of 18446744073709551615 bytes, the limit is 100000000"), std::string::npos);
  EXPECT_NE(File::open(folder.file("none")).status().message().find("No such file"), std::string::npos);
  EXPECT_NE(File::open("/dev/zero").status().message().find("not a regular file"), std::string::npos);
  ASSERT_EQ(::mkfifo(folder.file("pipe").c_str(), 0600), 0);
  EXPECT_NE(File::open(folder.file("pipe")).status().message().find("not a regular file"), std::string::npos);
}

TEST(Safetensors, WritesWhatItReads) {
  const Folder folder;
  const float a[] = {1, 2, 3};
  const int32_t b[] = {7};
  ASSERT_TRUE(write(folder.file("out"), {{"b", "I32", {1}, b, sizeof b}, {"a", "F32", {1, 3}, a, sizeof a}, {"n", "F32", {0}, nullptr, 0}},
                    {{"kernel", "\"quoted\""}})
                  .ok());
  EXPECT_EQ(folder.count(), 1u);
  const Result<File> file = File::open(folder.file("out"));
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->header().metadata.at("kernel"), "\"quoted\"");
  float read[3];
  ASSERT_TRUE(file->read(file->header().tensors.at("a"), read).ok());
  EXPECT_TRUE(std::equal(a, a + 3, read));
  EXPECT_EQ(file->header().tensors.at("a").begin, 4u);
}

TEST(Safetensors, KeepsTheOldFileWhereTheDiskIsFull) {
  const Folder folder;
  store(folder.file("out"), "old");
  const std::vector<char> large(1 << 20);
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{1 << 16, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const Status status = write(folder.file("out"), {{"a", "U8", {1 << 20}, large.data(), large.size()}}, {});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(contents(folder.file("out")), "old");
  EXPECT_EQ(folder.count(), 1u) << "a temporary file is left";
}

TEST(Safetensors, LeavesNothingWhereItIsKilledWhileItWrites) {
  const Folder folder;
  const int nameless = ::open(folder.file("").c_str(), O_WRONLY | O_TMPFILE, 0600);
  if (nameless < 0) GTEST_SKIP() << "this file system knows no files without a name";
  ::close(nameless);
  store(folder.file("out"), "old");
  const std::vector<char> large(1 << 20);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const rlimit small{1 << 16, 1 << 16}, none{0, 0};
    ::signal(SIGXFSZ, SIG_DFL);  // the signal comes in the middle of the file
    ::setrlimit(RLIMIT_CORE, &none);
    ::setrlimit(RLIMIT_FSIZE, &small);
    ::_exit(write(folder.file("out"), {{"a", "U8", {1 << 20}, large.data(), large.size()}}, {}).ok() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGXFSZ) << status;
  EXPECT_EQ(contents(folder.file("out")), "old");
  EXPECT_EQ(folder.count(), 1u) << "a temporary file is left";
}

TEST(Safetensors, WritesThroughASymbolicLinkAndToNoDevice) {
  const Folder folder;
  store(folder.file("real"), "old");
  std::filesystem::create_symlink("real", folder.file("link"));
  ASSERT_TRUE(write(folder.file("link"), {}, {}).ok());
  EXPECT_TRUE(std::filesystem::is_symlink(folder.file("link")));
  EXPECT_TRUE(File::open(folder.file("real")).ok());
  EXPECT_NE(write("/dev/null", {}, {}).message().find("not a regular file"), std::string::npos);
  EXPECT_NE(write("", {}, {}).message().find("not a file name"), std::string::npos);
  EXPECT_NE(write(folder.file("no/out"), {}, {}).message().find("No such file"), std::string::npos);
}

}  // namespace
}  // namespace tilewise::safetensors
