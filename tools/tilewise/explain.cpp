// tilewise explain: what a plan will do and what bounds it, as text with a picture of its tiles; tilewise devices.
#include <fmt/format.h>
#include <langinfo.h>

#include <algorithm>
#include <array>
#include <clocale>
#include <cstring>
#include <utility>

#include "tool.h"

namespace tilewise::tool {
namespace {

// Tiles of a picture's cells.
enum Cell : char { kSkipped, kMasked, kFull };
Cell cell_of(const TilePicture::Row& row, int64_t column) {
  if (column < row.begin || column >= row.end) return kSkipped;
  return column >= row.full_begin && column < row.full_end ? kFull : kMasked;
}
template <class Glyphs>  // by Cell
std::string line_of(const TilePicture& picture, const TilePicture::Row& row, const Glyphs& glyphs) {
  std::string line;
  for (int64_t column = 0; column < picture.columns; ++column) line += glyphs[cell_of(row, column)];
  return line;
}

// What the machine's measured rates make of a plan.
struct Times {
  double arithmetic, memory, limit;  // of the useful work and the least traffic: no kernel is faster than the larger one, limit
  double tiles, traffic, predicted;  // of the plan, whose masked tiles and filled dimensions cost as much as any: the larger one
  double standard;                   // limit of standard attention
  double standard_intensity;
};

Times times_of(const Problem& p, const Explanation& e, const Rates& rates) {
  const int64_t heads_of_tile = e.tiles.grouped ? p.num_heads_q / p.num_heads_kv : 1;
  const int64_t query_rows = p.seqlen_q * heads_of_tile;
  // Not grouped are the tiles of GPUs: an SM multiplies 64 rows at a time, whether all are there or not.
  const double rows = static_cast<double>(e.tiles.grouped ? query_rows : (query_rows + 63) / 64 * 64),
               keys = static_cast<double>(p.seqlen_k);
  const double tile = std::min<double>(e.tiles.block_m, rows) * std::min<double>(e.tiles.block_n, keys);
  const double d = static_cast<double>(e.tiles.head_dim), dv = static_cast<double>(e.tiles.head_dim_v);
  const double flops_per_pair = p.pass == Pass::kForward ? 2 * (d + dv) : 2 * (3 * d + 2 * dv);
  // Where there are fewer blocks than units, some have nothing to do.
  const double idle = std::max(1., static_cast<double>(e.tiles.units) / static_cast<double>(std::max<int64_t>(e.work_items, 1)));
  const double computed = idle * std::max(e.flops, static_cast<double>(e.full_tiles + e.masked_tiles) * tile * flops_per_pair);
  return {e.flops / rates.flops_per_second,
          e.least_bytes / rates.bytes_per_second,
          limit_seconds(e.flops, e.least_bytes, rates),
          computed / rates.flops_per_second,
          e.flash_bytes / rates.bytes_per_second,
          limit_seconds(computed, e.flash_bytes, rates),
          limit_seconds(e.flops, e.standard_bytes, rates),
          e.standard_bytes > 0 ? e.flops / e.standard_bytes : 0};
}

// The glyphs of Cell; ASCII where the terminal knows no more.
std::array<const char*, 3> glyphs() {
  std::setlocale(LC_CTYPE, "");
  if (std::strcmp(nl_langinfo(CODESET), "UTF-8") == 0) return {"·", "▒", "█"};
  return {".", "+", "#"};
}

// The kernels that were not chosen, each with its reason; one that more than three share stands once, with their number.
std::vector<std::string> lines_of_others(const Explanation& e) {
  constexpr int kShared = 3;
  std::vector<Candidate> others = e.candidates;
  std::erase_if(others, [&](const Candidate& c) { return c.name == e.kernel; });
  std::vector<std::string> lines;
  for (auto candidate = others.begin(); candidate != others.end(); ++candidate) {
    const auto same = [&](const Candidate& other) { return other.refusal == candidate->refusal; };
    const auto sharing = std::count_if(others.begin(), others.end(), same);
    const std::string& refusal = candidate->refusal;
    if (sharing <= kShared)
      lines.push_back(candidate->name + ": " + (refusal.empty() ? "takes it too" : refusal));
    else if (std::find_if(others.begin(), candidate, same) == candidate)
      lines.push_back(fmt::format("{} kernels: {}", sharing, refusal.empty() ? "take it too" : "each " + refusal));
  }
  return lines;
}

// Breaks a line of ASCII at spaces; what follows is indented by two.
std::vector<std::string> wrapped(std::string text, size_t columns) {
  std::vector<std::string> lines;
  while (text.size() > columns) {
    const size_t at = text.rfind(' ', columns);
    if (at == text.npos || at < 2) break;  // one long word
    lines.push_back(text.substr(0, at));
    text = "  " + text.substr(at + 1);
  }
  lines.push_back(text);
  return lines;
}

const char* desk_name(const Device& device) { return device.type == DeviceType::kCpu ? "L2 cache of a core" : "shared memory of an SM"; }
const char* unit_name(const Device& device) { return device.type == DeviceType::kCpu ? "threads" : "CTAs"; }

void print(const Problem& p, const Device& device, const Explanation& e, const Rates& rates, const char* source) {
  const auto row = [](const char* name, const std::string& text) { fmt::print("{:<11} {}\n", name, text); };
  const Times times = times_of(p, e, rates);
  constexpr size_t kColumns = 80 - 12;
  const std::vector<std::string> problem = wrapped(p.to_string(), kColumns);
  for (const std::string& part : problem) row(&part == problem.data() ? "problem" : "", part);
  row("device", device_text(device));
  row("kernel", e.kernel);
  for (const std::string& line : lines_of_others(e))
    for (const std::string& part : wrapped(line, kColumns)) row("", part);
  row("tiles", fmt::format("{} rows x {} keys, {} of the {} {}", e.tiles.block_m, e.tiles.block_n, bytes_text(e.tiles.desk_bytes),
                           bytes_text(device.desk_bytes), desk_name(device)));
  row("",
      fmt::format("{} blocks of {} for {} {}", e.work_items, p.pass == Pass::kForward ? "rows" : "keys", e.tiles.units, unit_name(device)));
  const bool filled = e.tiles.head_dim > p.head_dim || e.tiles.head_dim_v > p.head_dim_v;
  const auto dims = [](int64_t d, int64_t dv) { return d == dv ? fmt::format("{}", d) : fmt::format("{}/{}", d, dv); };
  if (filled)
    row("",
        fmt::format("head_dim {} filled up to {} with zeros", dims(p.head_dim, p.head_dim_v), dims(e.tiles.head_dim, e.tiles.head_dim_v)));
  if (p.packed)
    for (const std::string& part :
         wrapped("lengths are data: sequences count with all of seqlen_q and seqlen_k, while tokens last", kColumns))
      row("", part);
  if (p.deterministic && p.pass == Pass::kBackward && device.type == DeviceType::kCuda)
    row("", "deterministic: CTAs take turns, and no time below has their waiting");
  const auto glyph = glyphs();
  row("", fmt::format("{} full {}   {} masked {}   {} skipped {}", glyph[kFull], e.full_tiles, glyph[kMasked], e.masked_tiles,
                      glyph[kSkipped], e.skipped_tiles));
  const TilePicture& picture = e.picture;
  if (!picture.rows.empty()) {
    const bool each = picture.rows_per_cell == 1 && picture.columns_per_cell == 1;
    row("", "queries down, keys across, one sign " +
                (each ? "a tile" : fmt::format("for {} x {} tiles", picture.rows_per_cell, picture.columns_per_cell)) + ":");
  }
  for (const auto& cells : picture.rows) row("", "  " + line_of(picture, cells, glyph));
  row("arithmetic", si_text(e.flops) + "FLOP on visible pairs");
  fmt::print("\n{:<11} {:>12} {:>12}\n", "", "flash", "standard");
  const auto pair = [](const char* name, const std::string& flash, const std::string& standard, const std::string& note) {
    fmt::print("{:<11} {:>12} {:>12}   {}\n", name, flash, standard, note);
  };
  pair("extra", bytes_text(static_cast<double>(e.flash_extra_bytes)), bytes_text(static_cast<double>(e.standard_extra_bytes)),
       fmt::format("memory: workspace {} and lse", bytes_text(static_cast<double>(e.workspace_bytes))));
  pair("traffic", bytes_text(e.flash_bytes), bytes_text(e.standard_bytes), "to and from memory");
  if (device.type == DeviceType::kCuda) pair("", bytes_text(e.tile_bytes), "", "between L2 and the SMs");
  pair("intensity", fmt::format("{:.1f}", e.intensity), fmt::format("{:.1f}", times.standard_intensity),
       fmt::format("FLOP/byte; this {} balances at {:.1f}", device.type == DeviceType::kCuda ? "GPU" : "machine",
                   rates.flops_per_second / rates.bytes_per_second));
  pair("limit", seconds_text(times.limit), seconds_text(times.standard),
       fmt::format("at {}FLOP/s and {}B/s, {}", si_text(rates.flops_per_second), si_text(rates.bytes_per_second), source));
  pair("at best", seconds_text(times.predicted), "",
       fmt::format("{} bound, {} tiles in full", times.tiles >= times.traffic ? "arithmetic" : "memory", filled ? "filled" : "masked"));
}

Json explanation_json(const Problem& p, const Device& device, const Explanation& e, const Rates& rates, const char* source) {
  const Times times = times_of(p, e, rates);
  Json candidates = Json::array(), lines = Json::array();
  for (const Candidate& candidate : e.candidates) candidates.push_back({{"name", candidate.name}, {"refusal", candidate.refusal}});
  for (const auto& cells : e.picture.rows) lines.push_back(line_of(e.picture, cells, std::string(".+#")));
  return {{"problem", p.to_string()},
          {"device", device_json(device)},
          {"rates", {{"flops_per_second", rates.flops_per_second}, {"bytes_per_second", rates.bytes_per_second}, {"source", source}}},
          {"kernel", e.kernel},
          {"candidates", candidates},
          {"tiles",
           {{"block_m", e.tiles.block_m},
            {"block_n", e.tiles.block_n},
            {"desk_bytes", e.tiles.desk_bytes},
            {"units", e.tiles.units},
            {"grouped", e.tiles.grouped},
            {"head_dim", e.tiles.head_dim},
            {"head_dim_v", e.tiles.head_dim_v},
            {"work_items", e.work_items},
            {"full", e.full_tiles},
            {"masked", e.masked_tiles},
            {"skipped", e.skipped_tiles}}},
          {"picture",
           {{"tiles_down", e.picture.rows_per_cell},
            {"tiles_across", e.picture.columns_per_cell},
            {"full", "#"},
            {"masked", "+"},
            {"skipped", "."},
            {"rows", lines}}},
          {"flops", e.flops},
          {"flash",
           {{"bytes_moved", e.flash_bytes},
            {"tile_bytes", e.tile_bytes},
            {"least_bytes", e.least_bytes},
            {"extra_bytes", e.flash_extra_bytes},
            {"workspace_bytes", e.workspace_bytes},
            {"intensity", e.intensity},
            {"arithmetic_seconds", times.arithmetic},
            {"memory_seconds", times.memory},
            {"limit_seconds", times.limit},
            {"tiles_seconds", times.tiles},
            {"traffic_seconds", times.traffic},
            {"predicted_seconds", times.predicted}}},
          {"standard",
           {{"bytes_moved", e.standard_bytes},
            {"extra_bytes", e.standard_extra_bytes},
            {"intensity", times.standard_intensity},
            {"limit_seconds", times.standard}}}};
}

// GPUs that need not be here: what a plan asks of the device, and the data sheets' rates (bf16 and fp16 without sparsity, HBM).
struct Card {
  const char* name;
  Device device;
  Rates rates;
};
const std::vector<Card>& cards() {
  const auto hopper = [](const char* name, int64_t memory_bytes) {
    Device device;
    device.type = DeviceType::kCuda, device.name = name, device.arch = "sm_90", device.units = 132;
    device.near_bytes = 256 << 10, device.desk_bytes = 227 << 10, device.memory_bytes = memory_bytes;
    return device;
  };
  static const std::vector<Card> kCards{{"h100", hopper("NVIDIA H100 SXM", 80'000'000'000), {989.4e12, 3.35e12}},
                                        {"h200", hopper("NVIDIA H200", 141'000'000'000), {989.4e12, 4.8e12}}};
  return kCards;
}

struct ExplainOptions {
  std::vector<std::string> problem;
  bool json = false;
  DeviceOptions device;
};

void explain_one(const ExplainOptions& options) {
  const std::vector<Problem> problems = read_problems(options.problem);
  if (problems.size() != 1) throw Failure(kBadRequest, fmt::format("explain takes one PROBLEM, not {}", problems.size()));
  const auto card = std::ranges::find(cards(), options.device.device, &Card::name);
  const bool here = card == cards().end();
  const Device device = here ? options.device.open() : card->device;
  const Explanation e = require(explain(problems[0], device));
  const Rates rates = here ? rates_of(device, problems[0].dtype) : card->rates;
  const char* source = here ? "measured" : "data sheet";
  if (options.json)
    write_json(explanation_json(problems[0], device, e, rates, source), "-");
  else
    print(problems[0], device, e, rates, source);
}

constexpr std::array kTypes = {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16};

void list_devices(bool as_json) {
  Json list = Json::array();
  for (const Device& device : Device::all()) {
    Json entry = device_json(device);
    const bool cpu = device.type == DeviceType::kCpu;
    if (!as_json) {
      fmt::print("{} {}: {}\n", cpu ? "cpu" : "cuda", device.index, device_text(device));
      fmt::print("  {:<9} {}, {} {}, {} {}\n", "memory", bytes_text(device.memory_bytes), desk_name(device), bytes_text(device.desk_bytes),
                 cpu ? "L1" : "registers", bytes_text(device.near_bytes));
    }
    bool first = true;
    for (const DataType dtype : kTypes) {
      const Result<Rates> measured = measure_rates(device, dtype);
      if (!measured && measured.status().code() == StatusCode::kUnsupported) continue;
      const Rates rates = require(measured);
      entry["rates"][dtype_name(dtype)] = {{"flops_per_second", rates.flops_per_second}, {"bytes_per_second", rates.bytes_per_second}};
      if (as_json) continue;
      if (std::exchange(first, false)) fmt::print("  {:<9} {}B/s reading, measured\n", "traffic", si_text(rates.bytes_per_second));
      fmt::print("  {:<9} {}FLOP/s of multiply-add, measured\n", dtype_name(dtype), si_text(rates.flops_per_second));
    }
    list.push_back(entry);
  }
  if (const Result<Device> gpu = Device::cuda(); !gpu && !as_json) fmt::print("{}\n", gpu.status().message());
  if (as_json) write_json(list, "-");
}

}  // namespace

std::vector<std::string> card_names() {
  std::vector<std::string> names;
  for (const Card& card : cards()) names.emplace_back(card.name);
  return names;
}

void add_explain(CLI::App* app) {
  auto* command = app->add_subcommand("explain", "The tile plan of a problem, what it moves and what bounds it");
  auto options = std::make_shared<ExplainOptions>();
  command->add_option("problem", options->problem, "PROBLEM")->type_name("")->required();
  command->add_flag("--json", options->json, "as JSON");
  options->device.add_to(command, true);
  command->footer(
      "Example: tilewise explain q4096 h8 d64 bf16 causal\nh100 and h200 are planned for by their data sheets, wherever this runs.");
  command->callback([options] { explain_one(*options); });
}

void add_devices(CLI::App* app) {
  auto* command = app->add_subcommand("devices", "The devices of this machine with their sizes and measured rates");
  auto json = std::make_shared<bool>(false);
  command->add_flag("--json", *json, "as JSON");
  command->footer("Example: tilewise devices --json");
  command->callback([json] { list_devices(*json); });
}

}  // namespace tilewise::tool
