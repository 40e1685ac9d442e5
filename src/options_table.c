/* SPDX-License-Identifier: MIT
 * One row per flag. */
#include "src/options_table.h"

#include <limits.h>
#include <stddef.h>
#include <string.h>

enum {
    PLAN = 1 << POE_COMMAND_PLAN,
    TRAIN = 1 << POE_COMMAND_TRAIN | PLAN, /* a run's flags, as they stand, are those of its plan */
    GENERATE = 1 << POE_COMMAND_GENERATE,
    INSPECT = 1 << POE_COMMAND_INSPECT,
    EXPORT = 1 << POE_COMMAND_EXPORT,
    DATA = 1 << POE_COMMAND_DATA,
    ALL = TRAIN | GENERATE | INSPECT | EXPORT | DATA,

    FIXED = POE_OPTION_RUN, /* stays as the run was started */
    CHANGEABLE = POE_OPTION_RUN | POE_OPTION_RESUMABLE,
    LOCAL = POE_OPTION_RUN | POE_OPTION_RESUMABLE | POE_OPTION_LOCAL,
    ONCE = POE_OPTION_RUN | POE_OPTION_RESUMABLE | POE_OPTION_ONCE,
    CALL = POE_OPTION_RESUMABLE | POE_OPTION_LOCAL, /* belongs to one call, not to the run */
};

#define FIELD(member) offsetof(poe_options, member)
#define INT(name, member, fallback, low, high, commands, traits, help)                                                 \
    {                                                                                                                  \
        name, "N", GROUP, POE_OPTION_TYPE_INT, FIELD(member), fallback, low, high, NULL, commands, traits, help        \
    }
#define INT64(name, member, fallback, low, high, commands, traits, help)                                               \
    {                                                                                                                  \
        name, "N", GROUP, POE_OPTION_TYPE_INT64, FIELD(member), fallback, low, high, NULL, commands, traits, help      \
    }
#define SIZE(name, member, fallback, commands, traits, help)                                                           \
    {                                                                                                                  \
        name, "SIZE", GROUP, POE_OPTION_TYPE_SIZE, FIELD(member), fallback, 0, EXACT_MAX, NULL, commands, traits, help \
    }
#define REAL(name, member, fallback, low, high, commands, traits, help)                                                \
    {                                                                                                                  \
        name, "X", GROUP, POE_OPTION_TYPE_REAL, FIELD(member), fallback, low, high, NULL, commands, traits, help       \
    }
#define BOOL(name, member, commands, traits, help)                                                                     \
    {                                                                                                                  \
        name, NULL, GROUP, POE_OPTION_TYPE_BOOL, FIELD(member), NULL, 0, 0, NULL, commands, traits, help               \
    }
#define WORD(name, member, fallback, words, commands, traits, help)                                                    \
    {                                                                                                                  \
        name, words, GROUP, POE_OPTION_TYPE_WORD, FIELD(member), fallback, 0, 0, words, commands, traits, help         \
    }
#define STRING(name, argument, member, fallback, commands, traits, help)                                               \
    {                                                                                                                  \
        name, argument, GROUP, POE_OPTION_TYPE_STRING, FIELD(member), fallback, 0, 0, NULL, commands, traits, help     \
    }
#define PATH(name, argument, member, commands, traits, help)                                                           \
    {                                                                                                                  \
        name, argument, GROUP, POE_OPTION_TYPE_PATH, FIELD(member), NULL, 0, 0, NULL, commands, traits, help           \
    }
#define FILES(name, member, commands, traits, help)                                                                    \
    {                                                                                                                  \
        name, "FILE", GROUP, POE_OPTION_TYPE_FILES, FIELD(member), NULL, 0, 0, NULL, commands, traits, help            \
    }

/* The largest whole number that a double names exactly. */
#define EXACT_MAX 9007199254740991.0
/* A learning rate, decay or factor; zero switches it off. */
#define RATE_MAX 1e6

const poe_option poe_option_table[] = {
#define GROUP "Model"
    WORD("size", size, NULL, "tiny|286m|897m|1.3b|3b", TRAIN, FIXED,
         "preset of the sizes below; what is given beside it wins"),
    {"stages", "L,L,...", GROUP, POE_OPTION_TYPE_STAGES, FIELD(stages), "16,6,5,5", 0, 0, NULL, TRAIN, FIXED,
     "layers of every stage, LxN for N alike; one rank per stage"},
    WORD("head", head, "sh", "sh|ps", TRAIN, FIXED, "one head shared by all stages, or with one more per stage"),
    WORD("objective", objective, "poe", "poe|bp|hierarchical", TRAIN, FIXED,
         "local losses, backpropagation with one loss, or a loss per stage whose gradient goes all the way back"),
    REAL("alpha", alpha, "0", 0, 1, TRAIN, FIXED, "the loss of each of K stages counts 1/K^(1-alpha)"),
    WORD("backout", backout, "auto", "auto|on|off", TRAIN, FIXED,
         "bp: subtract the middle layer before the head; auto: on under bp"),
    INT("n-embd", n_embd, "128", 24, 65536, TRAIN, FIXED, "channels"),
    INT("n-head", n_head, "4", 1, 4096, TRAIN, FIXED, "query heads"),
    INT("n-kv-head", n_kv_head, "0", 0, 4096, TRAIN, FIXED, "key/value heads; 0: as many as query heads"),
    INT("mlp-dim", mlp_dim, "0", 0, 1048576, TRAIN, FIXED, "inner width of the MLPs; 0: 4 times the channels"),
    INT("sequence-len", sequence_len, "256", 1, 1048576, TRAIN, FIXED, "positions of a row"),
    INT("vocab-size", vocab_size, "0", 0, 65536, TRAIN | DATA, FIXED,
        "tokens; 0: the tokenizer's, or 1024 when one is trained"),
    STRING("window-pattern", "SSSL", window_pattern, "SSSL", TRAIN, FIXED,
           "attention windows, tiled over the layers: L whole, S a quarter"),
    REAL("norm-eps", norm_eps, "1.1920929e-7", 1e-30, 1, TRAIN, FIXED, "added to the mean square in every norm"),
#undef GROUP
#define GROUP "Training"
    INT("num-iterations", num_iterations, "130", 0, INT_MAX, TRAIN, CHANGEABLE, "steps"),
    WORD("dtype", dtype, "fp32", "fp32|bf16", TRAIN, FIXED,
         "what the operands of matrix products are rounded to; sums, weights, optimiser stay fp32"),
    INT("device-batch-size", device_batch_size, "4", 1, 65536, TRAIN, FIXED, "rows of a micro-batch"),
    INT64("total-batch-size", total_batch_size, "4096", 1, EXACT_MAX, TRAIN, FIXED, "tokens of a step"),
    INT("warmup-steps", warmup_steps, "40", 0, INT_MAX, TRAIN, FIXED, "steps of linear warm-up"),
    REAL("warmdown-ratio", warmdown_ratio, "0.65", 0, 1, TRAIN, FIXED, "share of the steps in which the rates fall"),
    REAL("final-lr-frac", final_lr_frac, "0.05", 0, 1, TRAIN, FIXED, "what remains of the rates at the end"),
    REAL("matrix-lr", matrix_lr, "0.02", 0, RATE_MAX, TRAIN, FIXED, "rate of the block matrices (Muon)"),
    REAL("embedding-lr", embedding_lr, "0.3", 0, RATE_MAX, TRAIN, FIXED,
         "rate of the token embedding (AdamW, as below)"),
    REAL("unembedding-lr", unembedding_lr, "0.008", 0, RATE_MAX, TRAIN, FIXED, "rate of the heads"),
    REAL("scalar-lr", scalar_lr, "0.5", 0, RATE_MAX, TRAIN, FIXED, "rate of the residual and x0 scalars"),
    REAL("weight-decay", weight_decay, "0.28", 0, RATE_MAX, TRAIN, FIXED, "decay of the block matrices"),
    WORD("schedule", schedule, "auto", "auto|poe|gpipe|1f1b|zb-h1|zb-h2|interleaved|ddp", TRAIN, CHANGEABLE,
         "order of a step's passes; auto: poe for poe, else 1f1b; ddp: the whole model on every rank"),
    INT("virtual-stages", virtual_stages, "0", 0, POE_OPTION_STAGES, TRAIN, CHANGEABLE,
        "interleaved: stages, and so ranks, that take turns on one processor; 0: 2"),
    STRING("sync", "RULE", sync, "exact", TRAIN, FIXED,
           "shared parameters: exact, stale:D (applied D steps late) or every:N steps"),
    WORD("wire", wire, "fp32", "fp32|bf16|fp8|int8", TRAIN, FIXED,
         "what activations, and gradients that flow back, are rounded to on their way"),
    WORD("wire-shared", wire_shared, "fp32", "fp32|bf16", TRAIN, FIXED, "likewise the shared gradients' sums"),
    INT64("seed", seed, "0", 0, EXACT_MAX, TRAIN | GENERATE, FIXED, "of the initial weights, or of the sampling"),
#undef GROUP
#define GROUP "Data and evaluation"
    FILES("data", data, TRAIN | DATA, LOCAL,
          "text, .txt or .jsonl, or tokens, .bin; may be repeated; training without it takes the text that ships"),
    FILES("val-data", val_data, TRAIN | DATA, LOCAL, "held-out text; without it the last 10 % of the documents"),
    WORD("documents", documents, "blank-lines", "blank-lines|file", TRAIN | DATA, CHANGEABLE,
         "what separates the documents of a .txt"),
    PATH("tokenizer", "FILE", tokenizer, TRAIN | GENERATE | DATA, LOCAL,
         "tokenizer.json; without it one is trained on the text"),
    INT("eval-every", eval_every, "0", 0, INT_MAX, TRAIN, CHANGEABLE, "steps between evaluations; 0: at the end only"),
    INT64("eval-tokens", eval_tokens, "0", 0, EXACT_MAX, TRAIN, CHANGEABLE, "held-out tokens to evaluate on; 0: all"),
    BOOL("eval-only", eval_only, TRAIN, CALL, "evaluate --resume or --init-from, and stop"),
    WORD("aggregate", aggregate, "mean", "mean|sum|mean-raw", TRAIN | GENERATE, CHANGEABLE, "how stages are combined"),
#undef GROUP
#define GROUP "Files"
    PATH("config", "FILE", config, TRAIN | GENERATE | DATA, CALL,
         "read flags from JSON: keys with _ for -; flags beside it win"),
    PATH("out", "DIR", out, TRAIN | DATA, CALL, "folder to write into; a run without it takes runs/DATE-TIME"),
    PATH("resume", "WHAT", resume, TRAIN, CALL, "go on: a run folder, a checkpoint, or latest (under --out)"),
    BOOL("resume-older", resume_older, TRAIN, CALL, "fall back to the newest whole checkpoint"),
    PATH("init-from", "FILE", init_from, TRAIN, LOCAL, "initial weights, .safetensors"),
    PATH("export", "FILE", export_path, TRAIN | EXPORT, LOCAL, "write the final weights, .safetensors"),
    WORD("export-dtype", export_dtype, "fp32", "fp32|bf16", TRAIN | EXPORT, CHANGEABLE, "their type"),
    INT("save-every", save_every, "0", 0, INT_MAX, TRAIN, CHANGEABLE, "steps between checkpoints; 0: at the end only"),
    WORD("save-to", save_to, "own", "own|peer", TRAIN, CHANGEABLE,
         "peer: another rank keeps a copy of each stage's file"),
    INT("keep", keep, "0", 0, INT_MAX, TRAIN, CHANGEABLE, "newest checkpoints to keep; 0: all"),
#undef GROUP
#define GROUP "Ranks"
    INT("ranks", ranks, "0", 0, POE_OPTION_STAGES, TRAIN, CALL,
        "start so many by mpiexec; 0: one process, or as mpiexec did"),
    WORD("transport", transport, "auto", "auto|inproc|mpi|fabric", TRAIN, CHANGEABLE,
         "how ranks talk; auto: fabric under mpiexec"),
    INT("link-window", link_window, "0", 0, 65536, TRAIN, CHANGEABLE,
        "micro-batches under way between two ranks; 0: what schedule and --sync need"),
    STRING("fabric-provider", "NAME", fabric_provider, "tcp", TRAIN, CHANGEABLE,
           "fabric: libfabric's provider of the connections"),
    STRING("interface", "NAME", interface, NULL, TRAIN, LOCAL,
           "fabric: network interface; without it loopback on one host, the first one otherwise"),
    STRING("port-range", "A-B", port_range, NULL, TRAIN, LOCAL, "fabric: ports to listen on, one per rank of a host"),
    INT("threads", threads, "0", 0, 4096, TRAIN | GENERATE, LOCAL,
        "per rank; 0: cores of the host divided by its ranks"),
    REAL("deadline", deadline, "120", 0.1, 1e6, TRAIN, CHANGEABLE,
         "seconds without a sign of life before a rank is given up"),
    PATH("net", "RULES", net, TRAIN, CHANGEABLE,
         "emulate a network: rules such as '0-1:rtt=80ms,bw=1Gbit', a file of them, or none"),
    WORD("recompute", recompute, "auto", "auto|none|norms|block", TRAIN, LOCAL,
         "what backward computes again to save memory; auto: the least that fits --memory-limit"),
    SIZE("memory-limit", memory_limit, "0", TRAIN, LOCAL,
         "memory of a rank, as in 900MiB or 4GiB; 0: no limit"),
    WORD("kernels", kernels, "auto", "auto|generic|avx2|avx512", TRAIN | GENERATE, CHANGEABLE,
         "instructions to compute with"),
    BOOL("dry-run", dry_run, TRAIN, CALL, "show model and memory per rank, and stop"),
#undef GROUP
#define GROUP "Recovery"
    WORD("agents", agents, "auto", "auto|on|off", TRAIN, CALL,
         "a rank's stage process is looked after by an agent, which starts it again; auto: under mpiexec, over the "
         "fabric"),
    INT("spares", spares, "0", 0, POE_OPTION_STAGES, TRAIN, CALL,
        "of the ranks, how many have no stage until one moves there, as a SIGTERM to an agent asks for"),
    WORD("recover", recover, "replay", "replay|skip", TRAIN, CHANGEABLE,
         "a stage process that is started again repeats what it had done since its snapshot, or goes on without"),
    WORD("outage", outage, "stop", "stop|continue", TRAIN, CHANGEABLE,
         "a stage that dies again and again ends the run, or the stages before it go on as the shorter model that they "
         "are, until it is back; needs agents"),
    WORD("on-nan", on_nan, "stop", "stop|skip", TRAIN, CHANGEABLE,
         "a loss or gradient that is not finite ends the run, or its micro-batch is left out by that stage"),
    INT("snapshot-every", snapshot_every, "10", 1, INT_MAX, TRAIN, LOCAL, "steps between a stage's own snapshots"),
    SIZE("log-limit", log_limit, "256MiB", TRAIN, LOCAL,
         "memory of a rank for messages that may be wanted again; at its limit a snapshot is taken"),
#undef GROUP
#define GROUP "Faults"
    PATH("fault", "RULES", fault, TRAIN, ONCE,
         "let ranks fail: rules such as 'kill rank=2 step=20 phase=backward', a file of them, or none"),
    REAL("mtbf", mtbf, "0", 0, 1e6, TRAIN, ONCE, "mean seconds between random failures of the whole job; 0: none"),
    INT64("fault-seed", fault_seed, "0", 0, EXACT_MAX, TRAIN, ONCE, "of the random failures"),
#undef GROUP
#define GROUP "Measuring"
    PATH("trace", "FILE", trace, TRAIN, CALL, "write what every rank did when, for ui.perfetto.dev"),
    PATH("emulate-compute", "TIMES", emulate_compute, TRAIN, FIXED,
         "sleep instead of computing: forward=20ms,backward=40ms[,backward-input=,backward-weight=,optimizer=,jitter=], "
         "for all stages or as STAGE:...;STAGE:..."),
#undef GROUP
#define GROUP "What to do"
    PATH("checkpoint", "DIR", checkpoint, GENERATE | INSPECT | EXPORT, CALL,
         "a checkpoint, or a run folder: its newest"),
    PATH("prompt", "TEXT", prompt, GENERATE, CALL, "text to go on from"),
    INT("max-tokens", max_tokens, "200", 1, 1048576, GENERATE, CALL, "tokens to generate"),
    REAL("temperature", temperature, "0.8", 0, 100, GENERATE, CALL, "of the sampling; 0: the likeliest token"),
    INT("top-k", top_k, "50", 0, 65536, GENERATE, CALL, "sample among the K likeliest; 0: all"),
    BOOL("json", json, PLAN, CALL, "print the plan as JSON"),
    INT("stage", stage, "-1", -1, POE_OPTION_STAGES - 1, GENERATE, CALL, "use one stage alone, from 0"),
    INT("prefix", prefix, "-1", -1, POE_OPTION_STAGES - 1, GENERATE, CALL, "use stages 0 to this one"),
#undef GROUP
#define GROUP "Help"
    BOOL("help", help, ALL, CALL, "this"),
    BOOL("version", version, ALL, CALL, "version of poe-pipe"),
#undef GROUP
};

const int poe_option_count = (int)(sizeof(poe_option_table) / sizeof(poe_option_table[0]));

_Static_assert(sizeof(poe_option_table) / sizeof(poe_option_table[0]) <= 128, "poe_options.given has a bit per row");

const char *poe_command_title(poe_command command)
{
    static const char *const titles[] = {
        [POE_COMMAND_TRAIN] = "poe-pipe",           [POE_COMMAND_GENERATE] = "poe-pipe generate",
        [POE_COMMAND_INSPECT] = "poe-pipe inspect", [POE_COMMAND_EXPORT] = "poe-pipe export",
        [POE_COMMAND_DATA] = "poe-pipe data",       [POE_COMMAND_PLAN] = "poe-pipe plan",
    };
    return titles[command];
}

static bool same_name(const char *known, const char *name, size_t length)
{
    if (strlen(known) != length)
        return false;
    for (size_t i = 0; i < length; i++) {
        if (known[i] != name[i] && !(known[i] == '-' && name[i] == '_'))
            return false;
    }
    return true;
}

const poe_option *poe_option_find(const char *name, size_t length)
{
    for (int i = 0; i < poe_option_count; i++) {
        if (same_name(poe_option_table[i].name, name, length))
            return &poe_option_table[i];
    }
    return NULL;
}

static int smallest(int a, int b, int c)
{
    int ab = a < b ? a : b;
    return ab < c ? ab : c;
}

/* Edit distance (insertions, deletions, exchanges) of two short words; `_` and `-` are the same. */
static int edit_distance(const char *a, size_t n, const char *b, size_t m)
{
    int row[POE_OPTION_TEXT + 1];
    if (n > POE_OPTION_TEXT || m > POE_OPTION_TEXT)
        return INT_MAX;
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            char x = a[i - 1] == '_' ? '-' : a[i - 1];
            int exchanged = diagonal + (x != b[j - 1]);
            diagonal = row[j];
            row[j] = smallest(exchanged, row[j] + 1, row[j - 1] + 1);
        }
    }
    return row[m];
}

const char *poe_nearest_word(const char *word, size_t length, const char *const *words, int n)
{
    int best = INT_MAX;
    const char *nearest = NULL;
    for (int i = 0; i < n; i++) {
        int distance = edit_distance(word, length, words[i], strlen(words[i]));
        if (distance < best) {
            best = distance;
            nearest = words[i];
        }
    }
    int near = length < 6 ? 1 : (int)(length / 3);
    return best <= near ? nearest : NULL;
}

const char *poe_option_nearest(const char *name, size_t length, poe_command command)
{
    const char *names[128];
    int n = 0;
    for (int i = 0; i < poe_option_count; i++) {
        if (poe_option_table[i].commands & (1u << command))
            names[n++] = poe_option_table[i].name;
    }
    const char *nearest = poe_nearest_word(name, length, names, n);
    /* A word of a longer name: --batch-size, --embd, --iterations. */
    for (int i = 0; !nearest && length >= 4 && i < n; i++) {
        if (memmem(names[i], strlen(names[i]), name, length))
            nearest = names[i];
    }
    return nearest;
}
