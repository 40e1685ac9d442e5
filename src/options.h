/* SPDX-License-Identifier: MIT
 * What the user asks for: one table row per flag, read from the command line, from --config files and from the
 * config.json of a run that is resumed. Later sources win in this order: defaults, --size, the resumed run's
 * config.json, --config, flags. */
#ifndef POE_SRC_OPTIONS_H
#define POE_SRC_OPTIONS_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "src/files.h"
#include "src/status.h"

enum {
    POE_OPTION_STAGES = 128,
    POE_OPTION_LAYERS = 1024, /* of all stages together */
    POE_OPTION_FILES = 64,
    POE_OPTION_DELAY = 128, /* largest D of --sync stale:D */
    POE_OPTION_TEXT = 64,
    POE_OPTION_VOCAB = 1024, /* size of a tokenizer that is trained without --vocab-size */
};

typedef struct poe_stage_list {
    int count;
    int layers[POE_OPTION_STAGES];
} poe_stage_list;

typedef struct poe_file_list {
    int count;
    char *paths[POE_OPTION_FILES]; /* owned */
} poe_file_list;

typedef struct poe_options {
    /* model (spec 1 and 2) */
    char size[POE_OPTION_TEXT]; /* --size: preset's name, or "" */
    poe_stage_list stages;      /* default 16,6,5,5 */
    char head[POE_OPTION_TEXT]; /* sh | ps */
    char objective[POE_OPTION_TEXT]; /* poe | bp | hierarchical */
    double alpha;
    char backout[POE_OPTION_TEXT]; /* auto (on under bp) | on | off; JSON: also booleans */
    int n_embd, n_head, n_kv_head, mlp_dim, sequence_len, vocab_size; /* n_kv_head 0: n_head; mlp_dim 0: 4 C; vocab_size 0: the tokenizer's */
    char window_pattern[POE_OPTION_TEXT];
    double norm_eps;
    /* training */
    char dtype[POE_OPTION_TEXT]; /* fp32 | bf16: operands of the matrix products */
    int device_batch_size;   /* rows of a micro-batch */
    int64_t total_batch_size; /* tokens of a step */
    int num_iterations, warmup_steps;
    double warmdown_ratio, final_lr_frac, matrix_lr, embedding_lr, unembedding_lr, scalar_lr, weight_decay;
    char schedule[POE_OPTION_TEXT]; /* auto | poe | gpipe | 1f1b | zb-h1 | zb-h2 | interleaved | ddp */
    int virtual_stages;             /* that share a processor under interleaved; 0: poe_options_virtual() says */
    char sync[POE_OPTION_TEXT]; /* exact | stale | stale:D | every:N */
    char wire[POE_OPTION_TEXT]; /* fp32 | bf16 | fp8 | int8: what crosses between stages */
    char wire_shared[POE_OPTION_TEXT]; /* fp32 | bf16: the shared gradients */
    int sync_delay; /* D, derived; 0 for exact */
    int sync_every; /* N, derived; 0 when not every:N */
    int64_t seed;
    /* data */
    poe_file_list data, val_data; /* training without --data: the text that ships */
    char documents[POE_OPTION_TEXT]; /* blank-lines | file: what a document is in a .txt */
    char *tokenizer;                 /* owned; NULL: train one */
    /* evaluation */
    int eval_every; /* steps; 0: at the end only */
    int64_t eval_tokens; /* 0: all */
    bool eval_only;
    char aggregate[POE_OPTION_TEXT]; /* mean | sum | mean-raw */
    /* files */
    char *config, *out, *resume, *init_from, *export_path; /* owned; NULL: not given */
    char export_dtype[POE_OPTION_TEXT];                    /* fp32 | bf16 */
    bool resume_older; /* --resume-older: fall back to the newest whole checkpoint */
    int save_every, keep; /* 0: only at the end; 0: keep all */
    char save_to[POE_OPTION_TEXT]; /* own | peer */
    /* ranks */
    int ranks;   /* --ranks: start mpiexec with so many; 0: do not */
    int spares;  /* ranks beyond those of the stages, to which a stage can move */
    char transport[POE_OPTION_TEXT]; /* auto | inproc | mpi | fabric */
    int link_window; /* messages of activations under way on a link, at least what the schedule needs; 0: that */
    char fabric_provider[POE_OPTION_TEXT];
    char interface[POE_OPTION_TEXT];  /* "": chosen */
    char port_range[POE_OPTION_TEXT]; /* "A-B", or "": any */
    int port_low, port_high;          /* derived; 0: any */
    int threads; /* per rank; 0: cores of the host divided by its ranks, at least 1 */
    double deadline; /* seconds */
    char *net;       /* owned; NULL or "none": the network as it is */
    char recompute[POE_OPTION_TEXT]; /* auto (the first that fits memory_limit) | none | norms | block */
    int64_t memory_limit;            /* bytes of a rank; 0: none. JSON: also texts, "4GiB" */
    char kernels[POE_OPTION_TEXT]; /* auto | generic | avx2 | avx512 */
    bool dry_run;
    /* recovery */
    char agents[POE_OPTION_TEXT];  /* auto | on | off */
    char recover[POE_OPTION_TEXT]; /* replay | skip */
    char outage[POE_OPTION_TEXT];  /* stop | continue */
    int snapshot_every;            /* steps */
    char on_nan[POE_OPTION_TEXT];  /* stop | skip */
    int64_t log_limit;             /* bytes; 0: the default of comm/agent/relay.h */
    /* faults; a resumed run starts without those of the run before */
    char *fault; /* owned; NULL or "none": no rules */
    double mtbf; /* seconds; 0: no random failures */
    int64_t fault_seed;
    /* measuring */
    char *trace;           /* owned; NULL: none */
    char *emulate_compute; /* owned; NULL: compute; else poe_emulation_parse() takes it */
    /* generation (poe-pipe generate) and other subcommands */
    char *checkpoint, *prompt; /* owned; inspect: checkpoint is its PATH */
    int max_tokens;
    double temperature;
    int top_k;
    int stage, prefix; /* -1: not given; neither: the full aggregate */
    bool json;         /* plan: for scripts */
    /* help and version are answered by whoever parses: */
    bool help, version;
    uint64_t given[2]; /* one bit per flag: poe_options_given() */
} poe_options;

/* Which program the flags are for: subcommands know only some of them. */
typedef enum poe_command {
    POE_COMMAND_TRAIN,    /* poe-pipe [flags] */
    POE_COMMAND_GENERATE, /* poe-pipe generate --checkpoint DIR --prompt TEXT */
    POE_COMMAND_INSPECT,  /* poe-pipe inspect PATH */
    POE_COMMAND_EXPORT,   /* poe-pipe export --checkpoint DIR --export FILE.safetensors [--export-dtype bf16] */
    POE_COMMAND_DATA,     /* poe-pipe data --data ... --out DIR [--tokenizer FILE | --vocab-size V] */
    POE_COMMAND_PLAN,     /* poe-pipe plan [a run's flags] [--json] */
} poe_command;

/* Fills `options` from the command line (argv[0] is skipped; a subcommand's name too) and everything it refers to.
 * --resume without --out sets `out` to the run's folder. With --help or --version nothing else is looked at.
 * POE_BAD_INPUT: one sentence, naming the flag or file and key, what was found and what is allowed; an unknown flag
 * gets the nearest known one. In any case the caller calls poe_options_free(). */
poe_status poe_options_parse(int argc, char **argv, poe_command *command, poe_options *options);
void poe_options_free(poe_options *options);

/* Everything that decides the run's numbers and files as JSON (keys = flag names with _ for -), such that --config
 * with it repeats the run exactly. New reference. */
json_t *poe_options_json(const poe_options *options);
/* Name of the first key in which two such objects differ, ignoring keys that may differ between ranks (out, threads,
 * export, ...), or NULL. Values are rendered into a and b. */
const char *poe_options_difference(const json_t *x, const json_t *y, char a[256], char b[256]);
/* True for the keys that a resumed run may change (num_iterations, data, out, ...): the others must stay. */
bool poe_options_resumable(const char *key);
/* True when the flag or key (by flag name, "num-iterations") was given by the user, not by a default, preset or the resumed run. */
bool poe_options_given(const poe_options *options, const char *flag);

/* Ranks of a run in one process: one per stage, or under --schedule ddp as many as --ranks says. */
int poe_options_rank_count(const poe_options *options);
/* Ranks that share a processor and take turns: 1 but under --schedule interleaved. */
int poe_options_virtual(const poe_options *options);
/* Whether a run's ranks have agents, if each is one of `processes` processes that a launcher starts. */
bool poe_options_agents(const poe_options *options, int processes);
/* Whether `ranks` ranks can share out a step's micro-batches (--schedule ddp). POE_BAD_INPUT: said. */
poe_status poe_options_check_ranks(const poe_options *options, int ranks);

/* Help, grouped, for one command, on standard output. */
void poe_options_help(poe_command command);

#endif
