// tilewise: exact attention from the command line. Every failure is one sentence on stderr and an exit code.
#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <new>

#include "tool.h"

static constexpr const char* kCommands = "attend, bench, verify, explain or devices";

// The exit code where all went well; a reader of stdout that is not there, or a full disk, is a failure as any other.
static int finish() {
  std::cout.flush();  // CLI11 prints help there
  if (std::fflush(stdout) == 0 && !std::ferror(stdout) && std::cout) return 0;
  fmt::print(stderr, "tilewise: stdout cannot be written: {}\n", std::strerror(errno));
  return tilewise::tool::kBadRequest;
}

int main(int argc, char** argv) {
  using namespace tilewise::tool;
  CLI::App app("Exact attention, tiled: FlashAttention on CPUs and NVIDIA GPUs.", "tilewise");
  app.set_version_flag("--version", "tilewise " TILEWISE_VERSION);
  app.require_subcommand(0, 1);
  app.footer(
      "A PROBLEM is one line of words in any order, for example \"bwd b2 q4096 k4096 h32/8 d128 bf16 causal\"; only q and d are needed.\n"
      "  fwd | bwd         forward, or the gradients                       fp32 | bf16 | fp16  type of q, k, v, o (fp32)\n"
      "  bN                sequences (1)                                   scale=X             softmax_scale (1/sqrt(d))\n"
      "  qN kN             queries, keys; packed: of the longest (k: as q) softcap=X           scores become X tanh(score / X)\n"
      "  hN[/N]            heads of q / of k and v (1)                     alibi               a slope for each head\n"
      "  dN[/N]            head dimension of q and k / of v and o          sink                a logit without a value for each head\n"
      "  causal            no key after a query's own place                seqused             each sequence has its own number of keys\n"
      "  window=L,R        L keys before it to R after it, -1: all         deterministic       gradients repeatable bit by bit\n"
      "  topleft           the diagonal starts at the first key, not ends at the last\n"
      "  packed tqN tkN    sequences one after the other, tq queries and tk keys together\n"
      "  accumulate        bwd: dq, dk and dv are float32 and are added to\n"
      "Exit codes: 0 done, 1 a result is wrong (verify), 2 bad usage, file or problem, 3 no such device or memory.\n"
      "Each command shows its options and an example with --help.");
  app.failure_message([](const CLI::App*, const CLI::Error& error) { return fmt::format("tilewise: {}\n", error.what()); });
  add_attend(&app);
  add_bench(&app);
  add_verify(&app);
  add_explain(&app);
  add_devices(&app);
  try {
    if (argc > 1 && argv[1][0] != '-' && app.get_subcommands([&](const CLI::App* command) { return command->check_name(argv[1]); }).empty())
      throw Failure(kBadRequest, fmt::format("'{}' is no command: {}", argv[1], kCommands));
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) throw Failure(kBadRequest, fmt::format("a command is missing: {}", kCommands));
    return finish();
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? finish() : kBadRequest;
  } catch (const Failure& failure) {
    std::fflush(stdout);
    fmt::print(stderr, "tilewise: {}\n", failure.what());
    return failure.exit_code;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "tilewise: not enough memory\n");
    return kUnavailable;
  } catch (const std::exception& error) {
    fmt::print(stderr, "tilewise: {}\n", error.what());
    return kBadRequest;
  }
}
