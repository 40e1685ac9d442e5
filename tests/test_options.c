/* SPDX-License-Identifier: MIT
 * Flags, --config files, presets and resumed runs: what is taken, from where, and the sentence for what is refused. */
#include "src/options.h"

#include <dirent.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <unistd.h>

#include "src/emulation.h"
#include "src/log.h"
#include "tests/check.h"

enum { ARGUMENTS = 40 };

static char folder[] = "/tmp/poe-options-XXXXXX";
static char said[4096]; /* what the last parse() wrote on standard error */

/* Parses the words of `line`, split at single blanks; %s in it as printf does. The caller frees the options. */
static poe_status parse(poe_options *options, poe_command *command, const char *format, ...)
{
    static char line[8192];
    char *argv[ARGUMENTS] = {(char *)"poe-pipe"}, path[4200];
    int argc = 1, stderr_copy = dup(STDERR_FILENO);
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    for (char *word = strtok(line, " "); word && argc < ARGUMENTS; word = strtok(NULL, " "))
        argv[argc++] = word;
    snprintf(path, sizeof(path), "%s/stderr", folder);
    CHECK(freopen(path, "w+", stderr) != NULL);
    poe_status status = poe_options_parse(argc, argv, command, options);
    fflush(stderr);
    rewind(stderr);
    said[fread(said, 1, sizeof(said) - 1, stderr)] = '\0';
    dup2(stderr_copy, STDERR_FILENO);
    close(stderr_copy);
    return status;
}

/* One sentence, on one line, with `part` in it, and status POE_BAD_INPUT. */
#define REFUSED(part, ...)                                                                                             \
    do {                                                                                                               \
        poe_options refused_options;                                                                                   \
        poe_command refused_command;                                                                                   \
        CHECK_INT(parse(&refused_options, &refused_command, __VA_ARGS__), POE_BAD_INPUT);                              \
        poe_options_free(&refused_options);                                                                            \
        if (!strstr(said, part) || strchr(said, '\n') != said + strlen(said) - 1) {                                    \
            fprintf(stderr, "%s:%d: said \"%s\", expected one line with \"%s\"\n", __FILE__, __LINE__, said, part);    \
            check_failures++;                                                                                          \
        }                                                                                                              \
    } while (0)

static void write_file(const char *name, const char *text)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0);
    if (f)
        fclose(f);
}

static void make_folder(const char *name)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    CHECK_INT(mkdir(path, 0777), 0);
}

static void test_defaults(void)
{
    poe_options o;
    poe_command command;
    CHECK_INT(parse(&o, &command, ""), POE_OK);
    CHECK_INT(command, POE_COMMAND_TRAIN);
    CHECK_INT(o.stages.count, 4);
    CHECK_INT(o.stages.layers[0], 16);
    CHECK_INT(o.stages.layers[3], 5);
    CHECK_STRING(o.head, "sh");
    CHECK_STRING(o.objective, "poe");
    CHECK_STRING(o.backout, "auto");
    CHECK_INT(o.n_embd, 128);
    CHECK_INT(o.n_kv_head, 0);
    CHECK_INT(o.total_batch_size, 4096);
    CHECK_INT(o.warmup_steps, 40);
    CHECK_NEAR(o.warmdown_ratio, 0.65, 0, 0);
    CHECK_NEAR(o.norm_eps, 1.1920929e-7, 0, 0);
    CHECK_NEAR(o.deadline, 120, 0, 0);
    CHECK_STRING(o.aggregate, "mean");
    CHECK_INT(o.sync_delay, 0);
    CHECK_INT(o.stage, -1);
    CHECK_STRING(o.dtype, "fp32");
    CHECK_STRING(o.schedule, "auto");
    CHECK_INT(o.link_window, 0);
    CHECK_INT(poe_options_rank_count(&o), 4);
    CHECK(!o.out && !o.tokenizer && !o.dry_run);
    CHECK(o.data.count == 1 && strstr(o.data.paths[0], "/tinyshakespeare.txt") && !poe_options_given(&o, "data"));
    CHECK(!poe_options_given(&o, "n-embd"));
    poe_options_free(&o);
}

static void test_flags(void)
{
    poe_options o;
    poe_command command;
    CHECK_INT(parse(&o, &command,
                    "--stages 2,1 --n-embd=64 --alpha 0.5 --dry-run --data a.txt --data b.txt --out /tmp/x --seed 7 "
                    "--sync stale:3 --backout on --n-embd 96 --export f --size tiny --resume-older=false"),
              POE_OK);
    CHECK_INT(o.stages.count, 2);
    CHECK_INT(o.n_embd, 96);
    CHECK_INT(o.n_head, 6); /* of the preset */
    CHECK_INT(o.sequence_len, 512);
    CHECK_NEAR(o.alpha, 0.5, 0, 0);
    CHECK(o.dry_run && !o.resume_older);
    CHECK_INT(o.data.count, 2);
    CHECK_STRING(o.data.paths[1], "b.txt");
    CHECK_STRING(o.out, "/tmp/x");
    CHECK_STRING(o.export_path, "f");
    CHECK_INT(o.sync_delay, 3);
    CHECK(poe_options_given(&o, "n-embd") && poe_options_given(&o, "n_embd") && !poe_options_given(&o, "n-head"));
    poe_options_free(&o);

    CHECK_INT(parse(&o, &command, "--sync stale"), POE_OK);
    CHECK_INT(o.sync_delay, 1);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--sync every:3 --ranks 1"), POE_OK);
    CHECK_INT(o.sync_every, 3);
    CHECK_INT(o.sync_delay, 0);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--recompute norms --memory-limit 1.5GiB"), POE_OK);
    CHECK_STRING(o.recompute, "norms");
    CHECK_INT(o.memory_limit, 3LL << 29);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--memory-limit 4096"), POE_OK);
    CHECK_STRING(o.recompute, "auto");
    CHECK_INT(o.memory_limit, 4096);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--agents on --recover skip --snapshot-every 3"), POE_OK);
    CHECK_STRING(o.agents, "on");
    CHECK_STRING(o.recover, "skip");
    CHECK_INT(o.snapshot_every, 3);
    CHECK_INT(o.log_limit, 256LL << 20);
    CHECK_INT(o.spares, 0);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--stages 1,1,1 --ranks 5 --spares 2"), POE_OK);
    CHECK_INT(o.spares, 2);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--n-embd 3 --help"), POE_OK);
    CHECK(o.help);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "generate --version"), POE_OK);
    CHECK(o.version && command == POE_COMMAND_GENERATE);
    poe_options_free(&o);
}

static void test_refused_values(void)
{
    REFUSED("--n-embd: found \"x\", allowed is a whole number from 24 to 65536", "--n-embd x");
    REFUSED("--n-embd", "--n-embd 64.0");
    REFUSED("--n-embd", "--n-embd 64k");
    REFUSED("--n-embd", "--n-embd +64");
    REFUSED("--n-embd", "--n-embd 0x40");
    REFUSED("--n-embd", "--n-embd=");
    REFUSED("--n-embd", "--n-embd 4294967360");
    REFUSED("--seed", "--seed 99999999999999999999999");
    REFUSED("--seed", "--seed -1");
    REFUSED("--alpha: found \"nan\", allowed is a number from 0 to 1", "--alpha nan");
    REFUSED("--alpha", "--alpha inf");
    REFUSED("--alpha", "--alpha 1.5");
    REFUSED("--alpha", "--alpha 0.5x");
    REFUSED("--matrix-lr", "--matrix-lr 1e999");
    REFUSED("--matrix-lr", "--matrix-lr 0x1p3");
    REFUSED("--head: found \"shared\", allowed is sh or ps", "--head shared");
    REFUSED("tiny, 286m, 897m, 1.3b or 3b", "--size 7b");
    REFUSED("allowed is true or false", "--dry-run=yes");
    REFUSED("--data needs a value: --data FILE", "--data --dry-run");
    REFUSED("--out needs a value", "--out");
    REFUSED("letters S and L", "--window-pattern SXL");
    REFUSED("of 70 bytes", "--window-pattern SSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSS");
    REFUSED("--sync: found \"stale:0\"", "--sync stale:0");
    REFUSED("--sync", "--sync stale:2x");
    REFUSED("--sync", "--sync every");
    REFUSED("--sync", "--sync every:-3");
    REFUSED("--memory-limit: found \"4GB\", allowed is a whole number of bytes, or a number with KiB", "--memory-limit 4GB");
    REFUSED("--memory-limit", "--memory-limit 4.5");
    REFUSED("--memory-limit", "--memory-limit -1");
    REFUSED("--memory-limit", "--memory-limit MiB");
    REFUSED("--memory-limit", "--memory-limit 1.2.3MiB");
    REFUSED("--memory-limit", "--memory-limit 99999999TiB");
    REFUSED("auto, on or off", "--agents maybe");
    REFUSED("replay or skip", "--recover never");
    REFUSED("--outage continue lets a stage go on without the others: found --objective bp", "--objective bp --outage continue");
    REFUSED("--snapshot-every", "--snapshot-every 0");
    REFUSED("--log-limit", "--log-limit 1GB");
    REFUSED("--agents on: agents carry messages over the fabric; found --transport mpi", "--agents on --transport mpi");
    REFUSED("--ranks: found 4 with 3 stages in --stages and --spares 2", "--stages 1,1,1 --ranks 4 --spares 2");
    REFUSED("--spares is for ranks with agents, and --transport mpi has none", "--spares 1 --transport mpi");
    REFUSED("--spares and --net exclude each other", "--spares 1 --net 0-1:rtt=1ms");
    REFUSED("--agents on and --trace exclude each other", "--agents on --trace x.json");
    REFUSED("--agents on and --eval-only exclude each other", "--agents on --eval-only --init-from x.safetensors");
    REFUSED("found --schedule ddp", "--agents on --objective bp --schedule ddp --stages 3");
    REFUSED("none, norms or block", "--recompute all");
    REFUSED("--schedule zb-h1 is for gradients that flow back", "--schedule zb-h1");
    REFUSED("--schedule poe is for stages that learn from their own losses", "--objective hierarchical --schedule poe");
    REFUSED("needs --objective bp; found hierarchical", "--objective hierarchical --schedule ddp");
    REFUSED("give --stages one number", "--objective bp --schedule ddp --stages 2,2");
    REFUSED("deals the 4 micro-batches of a step", "--objective bp --schedule ddp --stages 4 --ranks 3");
    REFUSED("shares no parameters between stages; allowed is exact", "--objective bp --sync every:2");
    REFUSED("--wire-shared bf16: --objective bp shares no parameters", "--objective bp --wire-shared bf16");
    REFUSED("--wire: found \"fp4\"", "--wire fp4");
    REFUSED("--wire-shared: found \"fp8\"", "--wire-shared fp8");
    REFUSED("--wire int8: under --schedule ddp", "--objective bp --schedule ddp --stages 4 --wire int8");
}

static void test_emulation(void)
{
    poe_emulation e;
    CHECK_INT(poe_emulation_parse("forward=20ms,backward=40ms", 3, &e), POE_OK);
    CHECK_NEAR(e.seconds[2][POE_EMULATED_FORWARD], 0.02, 1e-12, 0);
    CHECK_NEAR(e.seconds[2][POE_EMULATED_BACKWARD_INPUT], 0.02, 1e-12, 0);
    CHECK_NEAR(e.seconds[0][POE_EMULATED_BACKWARD_WEIGHT], 0.02, 1e-12, 0);
    CHECK(e.seconds[0][POE_EMULATED_OPTIMIZER] == 0 && e.seconds[0][POE_EMULATED_JITTER] == 0);
    CHECK_INT(poe_emulation_parse("forward=1.5s,backward=2s,backward-input=1500us,optimizer=3ms,jitter=1ms;1-2:forward=7ms;"
                                  "2:backward=9ms,backward-weight=0s", 4, &e), POE_OK);
    const double forward[] = {1.5, 0.007, 0.007, 1.5}, backward[] = {2, 2, 0.009, 2}, weight[] = {1, 1, 0, 1};
    for (int k = 0; k < 4; k++) {
        CHECK_NEAR(e.seconds[k][POE_EMULATED_FORWARD], forward[k], 1e-12, 0);
        CHECK_NEAR(e.seconds[k][POE_EMULATED_BACKWARD], backward[k], 1e-12, 0);
        CHECK_NEAR(e.seconds[k][POE_EMULATED_BACKWARD_INPUT], 0.0015, 1e-12, 0);
        CHECK_NEAR(e.seconds[k][POE_EMULATED_BACKWARD_WEIGHT], weight[k], 1e-12, 0);
        CHECK_NEAR(e.seconds[k][POE_EMULATED_OPTIMIZER], 0.003, 1e-12, 0);
        CHECK_NEAR(e.seconds[k][POE_EMULATED_JITTER], 0.001, 1e-12, 0);
    }
    poe_options o;
    poe_command command;
    CHECK_INT(parse(&o, &command, "--stages 1x3,2,4x1 --emulate-compute forward=1ms,backward=1ms --trace /tmp/t.json"), POE_OK);
    CHECK_INT(o.stages.count, 5);
    CHECK_INT(o.stages.layers[2] * 100 + o.stages.layers[3] * 10 + o.stages.layers[4], 124);
    CHECK_STRING(o.trace, "/tmp/t.json");
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--emulate-compute forward=1ms,backward=1ms --save-every 2"), POE_OK);
    poe_options_free(&o);
}

static void test_refused_emulation(void)
{
    static const char *const times[][2] = {
        {"forward=20,backward=40ms", "found \"forward=20\", allowed is a time with its unit, s, ms or us, up to 3600s"},
        {"forward=20ms", "stage 0 has no time for backward; allowed is more than 0"},
        {"forward=0ms,backward=1ms", "stage 0 has no time for forward"},
        {"forward=-1ms,backward=1ms", "found \"forward=-1ms\""},
        {"forward=0x10ms,backward=1ms", "found \"forward=0x10ms\""},
        {"forward=nanms,backward=1ms", "found \"forward=nanms\""},
        {"forward=2h,backward=1ms", "found \"forward=2h\""},
        {"forward=3601s,backward=1ms", "found \"forward=3601s\""},
        {"fwd=2ms,backward=1ms", "found \"fwd=2ms\", allowed is forward, backward, backward-input"},
        {"forward,backward=1ms", "found \"forward\", allowed is NAME=TIME"},
        {"forward=1ms,,backward=1ms", "found \"\", allowed is NAME=TIME"},
        {"forward=1ms,backward=1ms;", "found \"\", allowed is NAME=TIME"},
        {"forward=1ms,backward=1ms;4:forward=2ms", "found \"4:\", allowed is a stage from 0 to 3"},
        {"forward=1ms,backward=1ms;2-1:forward=2ms", "found \"2-1:\", allowed is a stage from 0 to 3"},
        {"forward=1ms,backward=1ms;-1:forward=2ms", "found \"-1:\""},
        {"forward=1ms,backward=1ms;:forward=2ms", "found \":\""},
        {"0-2:forward=1ms,backward=1ms", "stage 3 has no time for forward"},
        {"forward=5ms,backward=9ms,jitter=5ms", "found a jitter of 5 ms at stage 0, allowed is at most its shortest time, "
                                                "backward-input of 4.5 ms"},
    };
    for (size_t i = 0; i < sizeof(times) / sizeof(*times); i++)
        REFUSED(times[i][1], "--emulate-compute %s", times[i][0]);
    static const char *const weights[] = {"--export x.safetensors", "--init-from x.safetensors", "--eval-every 2"};
    for (size_t i = 0; i < sizeof(weights) / sizeof(*weights); i++)
        REFUSED("--emulate-compute computes nothing, and --", "--emulate-compute forward=1ms,backward=1ms %s", weights[i]);
    REFUSED("--emulate-compute needs a value", "--emulate-compute");
    REFUSED("--trace needs a value", "--trace");
}

static void test_refused_stages(void)
{
    char many[1024] = "1";
    for (int i = 1; i < 129; i++)
        strcat(many, ",1");
    REFUSED("--stages: found \"2,0\", allowed is whole numbers of at least 1", "--stages 2,0");
    REFUSED("at least 1", "--stages 2,-1");
    REFUSED("at least 1", "--stages 2,,1");
    REFUSED("at least 1", "--stages 2,1,");
    REFUSED("at least 1", "--stages two");
    REFUSED("at least 1", "--stages 99999999999999999999");
    REFUSED("1024 layers", "--stages 1000,25");
    REFUSED("128 stages", "--stages %s", many);
    REFUSED("128 stages", "--stages 1x129");
    REFUSED("128 stages", "--stages 1x100,1x29");
    REFUSED("1024 layers", "--stages 500x3");
    REFUSED("LxN means N times L", "--stages 1x0");
    REFUSED("LxN means N times L", "--stages 1x");
    REFUSED("LxN means N times L", "--stages x3");
    REFUSED("LxN means N times L", "--stages 1x2x3");
    REFUSED("--ranks: found 3 with 4 stages", "--ranks 3");
    REFUSED("--ranks", "--ranks -1");
}

static void test_refused_together(void)
{
    REFUSED("multiples of 1024 tokens (--device-batch-size 4 rows of --sequence-len 256); the nearest is 5120",
            "--total-batch-size 5000");
    REFUSED("the nearest is 1024", "--total-batch-size 3");
    REFUSED("--resume latest needs --out", "--resume latest");
    REFUSED("--eval-only needs", "--eval-only");
    REFUSED("--resume-older needs --resume", "--resume-older");
    REFUSED("generate needs --prompt", "generate --checkpoint x");
    REFUSED("--stage and --prefix exclude", "generate --checkpoint x --prompt y --stage 1 --prefix 0");
    REFUSED("inspect needs a path", "inspect");
    REFUSED("export needs --export", "export --checkpoint x");
    REFUSED("data needs --out", "data --data x");
    REFUSED("--tokenizer and --vocab-size", "data --data x --out y --tokenizer t --vocab-size 300");
}

static void test_unknown(void)
{
    REFUSED("no flag --n-embed; did you mean --n-embd?", "--n-embed 64");
    REFUSED("did you mean --num-iterations?", "--num-iteration=5");
    REFUSED("did you mean --device-batch-size?", "--batch-size 5");
    REFUSED("did you mean --n-embd?", "--n_embd 64");
    REFUSED("no flag --zzzz; poe-pipe --help lists them", "--zzzz");
    REFUSED("poe-pipe generate has no flag --n-embd", "generate --n-embd 64");
    REFUSED("did you mean generate?", "generat");
    REFUSED("\"stray\"", "--n-embd 64 stray");
    REFUSED("\"-n\"", "-n 4");
}

static void test_config(void)
{
    poe_options o;
    poe_command command;
    write_file("c.json",
               "{\"stages\": [2, 1], \"backout\": true, \"alpha\": 0, \"data\": [\"x\", \"y\"], \"n_embd\": 48,\n"
               " \"dry_run\": true, \"size\": \"tiny\", \"out\": \"o\", \"sync\": \"stale\"}");
    CHECK_INT(parse(&o, &command, "--config %s/c.json --n-embd 96 --data z", folder), POE_OK);
    CHECK_INT(o.stages.count, 2);
    CHECK_STRING(o.backout, "on");
    CHECK_INT(o.n_embd, 96);
    CHECK_INT(o.n_head, 6);
    CHECK_INT(o.data.count, 1);
    CHECK_STRING(o.data.paths[0], "z");
    CHECK_STRING(o.out, "o");
    CHECK(o.dry_run);
    CHECK(poe_options_given(&o, "alpha") && poe_options_given(&o, "data") && !poe_options_given(&o, "mlp-dim"));
    poe_options_free(&o);
    write_file("c.json", "{\"stages\": \"3,2\", \"backout\": \"off\", \"data\": \"x\"}");
    CHECK_INT(parse(&o, &command, "--config %s/c.json", folder), POE_OK);
    CHECK_INT(o.data.count, 1);
    CHECK_INT(o.stages.layers[1], 2);
    CHECK_STRING(o.backout, "off");
    CHECK_STRING(o.data.paths[0], "x");
    poe_options_free(&o);
}

static void refuse_config(const char *text, const char *part)
{
    write_file("bad.json", text);
    REFUSED(part, "--config %s/bad.json", folder);
}

static void test_refused_config(void)
{
    REFUSED("--config: cannot read", "--config %s/none.json", folder);
    refuse_config("{\n\"n_embd\": 3,,\n}", "bad.json: line 2");
    refuse_config("[1]", "not an object");
    refuse_config("{\"n_embed\": 3}", "unknown key \"n_embed\"; did you mean \"n_embd\"?");
    refuse_config("{\"zzzz\": 3}", "unknown key \"zzzz\"; the keys are");
    refuse_config("{\"help\": true}", "unknown key \"help\"");
    refuse_config("{\"prompt\": \"x\"}", "unknown key \"prompt\"");
    refuse_config("{\"n_embd\": \"64\"}", "n_embd: found \"64\", allowed is a whole number");
    refuse_config("{\"n_embd\": 64.0}", "n_embd: found 64.0, allowed is a whole number");
    refuse_config("{\"n_embd\": 3}", "allowed is a whole number from 24");
    refuse_config("{\"n_embd\": 99999999999999999999}", "line 1");
    refuse_config("{\"n_embd\": null}", "found null");
    refuse_config("{\"n_embd\": 64, \"n_embd\": 96}", "line 1");
    refuse_config("{\"alpha\": \"0\"}", "allowed is a number");
    refuse_config("{\"dry_run\": 1}", "allowed is true or false");
    refuse_config("{\"head\": true}", "allowed is a text");
    refuse_config("{\"stages\": [1, \"2\"]}", "a list of whole numbers");
    refuse_config("{\"stages\": [1, 2.5]}", "a list of whole numbers");
    refuse_config("{\"stages\": [1, 0]}", "at least 1");
    refuse_config("{\"stages\": []}", "at least 1");
    refuse_config("{\"stages\": 3}", "a list of whole numbers");
    refuse_config("{\"data\": [1]}", "a text or a list of texts");
}

/* What a run writes down repeats it: the same object comes out of the object. */
static void test_round_trip(void)
{
    poe_options o;
    poe_command command;
    char a[256], b[256], path[4200];
    CHECK_INT(parse(&o, &command, "--size 3b --alpha 0.1 --data a --data b --sync every:3 --backout off --out z"),
              POE_OK);
    json_t *first = poe_options_json(&o);
    poe_options_free(&o);
    snprintf(path, sizeof(path), "%s/round.json", folder);
    CHECK_INT(json_dump_file(first, path, JSON_INDENT(1)), 0);
    CHECK(!json_object_get(first, "out") && !json_object_get(first, "dry_run"));
    CHECK_INT(parse(&o, &command, "--config %s", path), POE_OK);
    json_t *second = poe_options_json(&o);
    CHECK(json_equal(first, second));
    CHECK(poe_options_difference(first, second, a, b) == NULL);
    poe_options_free(&o);

    json_object_set_new(second, "threads", json_integer(9));
    json_object_set_new(second, "data", json_string("elsewhere"));
    json_object_set_new(second, "memory_limit", json_string("1GiB"));
    CHECK(poe_options_difference(first, second, a, b) == NULL);
    json_object_set_new(second, "n_embd", json_integer(64));
    CHECK_STRING(poe_options_difference(first, second, a, b), "n_embd");
    CHECK_STRING(a, "2048");
    CHECK_STRING(b, "64");
    json_object_set_new(second, "n_embd", json_integer(2048));
    json_object_del(second, "head");
    CHECK_STRING(poe_options_difference(second, first, a, b), "head");
    CHECK_STRING(a, "nothing");
    json_decref(first);
    json_decref(second);
    CHECK(poe_options_resumable("num_iterations") && poe_options_resumable("data") && poe_options_resumable("out"));
    CHECK(poe_options_resumable("recompute") && poe_options_resumable("memory_limit"));
    CHECK(!poe_options_resumable("n_embd") && !poe_options_resumable("seed") && !poe_options_resumable("sync"));
    CHECK(!poe_options_resumable("wire") && !poe_options_resumable("wire_shared"));
    CHECK(!poe_options_resumable("dtype"));
}

static void test_presets(void)
{
    static const struct {
        const char *name;
        int stages, n_embd, n_head, n_kv_head, mlp_dim, sequence_len, vocab_size;
        const char *head;
    } sizes[] = {
        {"tiny", 3, 384, 6, 6, 1536, 512, 0, "sh"},         {"286m", 3, 768, 12, 12, 3072, 1024, 32768, "ps"},
        {"897m", 4, 1280, 10, 10, 5120, 2048, 32768, "sh"}, {"1.3b", 4, 1536, 12, 12, 6144, 2048, 32768, "sh"},
        {"3b", 4, 2048, 16, 8, 12800, 2048, 32768, "ps"},
    };
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        poe_options o;
        poe_command command;
        CHECK_INT(parse(&o, &command, "--size %s --dry-run", sizes[i].name), POE_OK);
        CHECK_INT(o.stages.count, sizes[i].stages);
        CHECK_INT(o.n_embd, sizes[i].n_embd);
        CHECK_INT(o.n_head, sizes[i].n_head);
        CHECK_INT(o.n_kv_head, sizes[i].n_kv_head);
        CHECK_INT(o.mlp_dim, sizes[i].mlp_dim);
        CHECK_INT(o.sequence_len, sizes[i].sequence_len);
        CHECK_INT(o.vocab_size, sizes[i].vocab_size);
        CHECK_STRING(o.head, sizes[i].head);
        poe_options_free(&o);
    }
}

static void check_resumed(const char *what, const char *out)
{
    poe_options o;
    poe_command command;
    CHECK_INT(parse(&o, &command, "--resume %s/%s --num-iterations 9", folder, what), POE_OK);
    CHECK_INT(o.n_embd, 64);
    CHECK_INT(o.stages.count, 2);
    CHECK_INT(o.num_iterations, 9);
    CHECK(poe_options_given(&o, "num-iterations") && !poe_options_given(&o, "n-embd"));
    if (out)
        CHECK(o.out && strlen(o.out) >= strlen(out) && strcmp(o.out + strlen(o.out) - strlen(out), out) == 0);
    else
        CHECK(!o.out);
    poe_options_free(&o);
}

/* The faults of the run before are over. */
static void check_once(void)
{
    poe_options o;
    poe_command command;
    make_folder("faulty");
    write_file("faulty/config.json", "{\"n_embd\": 64, \"fault\": \"kill rank=0 step=3\", \"mtbf\": 20.0, "
                                     "\"fault_seed\": 4, \"net\": \"none\"}");
    CHECK_INT(parse(&o, &command, "--resume %s/faulty --fault-seed 5", folder), POE_OK);
    CHECK(!o.fault && o.mtbf == 0 && o.fault_seed == 5 && o.net);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "--config %s/faulty/config.json", folder), POE_OK);
    CHECK(o.fault && o.mtbf == 20 && o.fault_seed == 4);
    poe_options_free(&o);
}

static void test_resume(void)
{
    poe_options o;
    poe_command command;
    const char *config =
        "{\"stages\": [1, 1], \"n_embd\": 64, \"num_iterations\": 5, \"alpha\": 0, \"init_from\": \"i\"}";
    make_folder("run");
    make_folder("run/checkpoints");
    make_folder("run/checkpoints/step-00000003");
    make_folder("moved");
    make_folder("moved/step-00000003");
    write_file("run/config.json", config);
    write_file("run/checkpoints/step-00000003/manifest.json", "{}");
    write_file("moved/step-00000003/manifest.json", "{\"config\": {\"stages\": [1, 1], \"n_embd\": 64}}");
    check_resumed("run", "/run");
    check_resumed("run/", "/run/");
    check_resumed("run/checkpoints/step-00000003", "/run");
    check_resumed("run/checkpoints/step-00000003/", "/run");
    check_resumed("moved/step-00000003", NULL);
    check_once();
    CHECK_INT(parse(&o, &command, "--resume latest --out %s/run --n-embd 64", folder), POE_OK);
    CHECK_INT(o.num_iterations, 5);
    poe_options_free(&o);
    REFUSED("--n-embd: found 96, but the run of", "--resume %s/run --n-embd 96", folder);
    REFUSED("--dtype: found \"bf16\", but the run of", "--resume %s/run --dtype bf16", folder);
    REFUSED("--size: found \"3b\", but the run of", "--resume %s/run --size 3b", folder);
    REFUSED("neither a run folder", "--resume %s/nothing", folder);
    REFUSED("no run was started in --out", "--resume latest --out %s/moved", folder);
    REFUSED("exclude each other", "--resume %s/run --init-from f", folder);
    write_file("moved/step-00000003/manifest.json", "{}");
    REFUSED("has no \"config\"", "--resume %s/moved/step-00000003", folder);
}

static void test_commands(void)
{
    poe_options o;
    poe_command command;
    CHECK_INT(parse(&o, &command, "inspect some/path"), POE_OK);
    CHECK_INT(command, POE_COMMAND_INSPECT);
    CHECK_STRING(o.checkpoint, "some/path");
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "generate --checkpoint c --prompt=--x --top-k 5 --prefix 0"), POE_OK);
    CHECK_STRING(o.prompt, "--x");
    CHECK_INT(o.prefix, 0);
    poe_options_free(&o);
    CHECK_INT(parse(&o, &command, "data --data a --out b --vocab-size 300"), POE_OK);
    CHECK_INT(command, POE_COMMAND_DATA);
    poe_options_free(&o);
}

/* Every golden run's config.json is taken. */
static void test_golden(void)
{
    const char *shared = poe_test_shared();
    char path[4200];
    snprintf(path, sizeof(path), "%s/golden", shared ? shared : "");
    DIR *runs = shared ? opendir(path) : NULL;
    if (!runs)
        return;
    for (struct dirent *run; (run = readdir(runs));) {
        poe_options o;
        poe_command command;
        snprintf(path, sizeof(path), "%s/golden/%s/config.json", shared, run->d_name);
        if (run->d_name[0] == '.' || access(path, R_OK) != 0)
            continue;
        CHECK_INT(parse(&o, &command, "--config %s", path), POE_OK);
        poe_options_free(&o);
    }
    closedir(runs);
}

int main(void)
{
    CHECK(mkdtemp(folder) != NULL);
    test_defaults();
    test_flags();
    test_refused_values();
    test_emulation();
    test_refused_emulation();
    test_refused_stages();
    test_refused_together();
    test_unknown();
    test_config();
    test_refused_config();
    test_round_trip();
    test_presets();
    test_resume();
    test_commands();
    test_golden();
    CHECK_INT(poe_remove_tree(folder), POE_OK);
    return check_result();
}
