/* SPDX-License-Identifier: MIT
 * Plans from given times, and layouts from given costs: no clock is read. */
#include "pipeline/plan.h"
#include "tests/check.h"

static poe_options options_of(const char *const *flags, int n)
{
    char *argv[24] = {"poe-pipe", "plan"};
    poe_options options;
    poe_command command;
    for (int i = 0; i < n; i++)
        argv[i + 2] = (char *)flags[i];
    CHECK_INT(poe_options_parse(n + 2, argv, &command, &options), POE_OK);
    CHECK_INT(command, POE_COMMAND_PLAN);
    options.vocab_size = 512;
    return options;
}

static void check_layout(const poe_stage_list *layout, const char *expected)
{
    char text[256] = "";
    for (int k = 0; k < layout->count; k++)
        sprintf(text + strlen(text), k ? ",%d" : "%d", layout->layers[k]);
    CHECK_STRING(text, expected);
}

static void test_even(void)
{
    static const double equal[8] = {1, 1, 1, 1, 1, 1, 1, 1}, heavy[5] = {1, 1, 9, 1, 1};
    static const double nothing[3] = {0, 0, 0}, head_last[3] = {0, 0, 3}, heads[3] = {2, 2, 2};
    poe_stage_list layout = {0};
    poe_plan_even(equal, 8, 4, nothing, &layout);
    check_layout(&layout, "2,2,2,2");
    poe_plan_even(equal, 8, 4, heads, &layout);
    check_layout(&layout, "2,2,2,2");
    poe_plan_even(equal, 8, 3, head_last, &layout); /* 4, 3, 1 + 3 */
    check_layout(&layout, "4,3,1");
    poe_plan_even(equal, 8, 1, head_last, &layout);
    check_layout(&layout, "8");
    poe_plan_even(equal, 8, 8, nothing, &layout);
    check_layout(&layout, "1,1,1,1,1,1,1,1");
    poe_plan_even(heavy, 5, 3, nothing, &layout);
    CHECK_INT(layout.layers[0] + layout.layers[1] + layout.layers[2], 5);
    CHECK(layout.layers[0] >= 1 && layout.layers[0] <= 2 && layout.layers[2] >= 1);
}

/* Four equal stages, forward 20 ms, backward 40 ms, no network: what the formulas say. */
static void test_given(void)
{
    static const char *const flags[] = {"--stages", "2,2,2,2", "--n-embd", "32", "--sequence-len", "32",
                                        "--device-batch-size", "2", "--total-batch-size", "256", "--threads", "1"};
    static const char *const more[] = {"--stages",    "2,2,2,2", "--n-embd",   "32",    "--sequence-len",
                                       "32",          "--objective", "bp",     "--schedule", "zb-h1",
                                       "--device-batch-size", "2", "--total-batch-size", "256"};
    poe_options options = options_of(flags, 12);
    poe_theory_rank times[4];
    for (int k = 0; k < 4; k++)
        times[k] = (poe_theory_rank){
            .forward = 0.02, .backward = 0.04, .backward_input = 0.02, .backward_weight = 0.02};
    poe_plan_settings settings = {.options = &options, .n_ranks = 4, .given = times};
    static poe_plan plan;
    CHECK_INT(poe_plan_make(&settings, &plan), POE_OK);
    CHECK_STRING(plan.cases[0].name, "asked");
    CHECK_NEAR(plan.cases[0].result.step, 4 * 0.06 + 3 * 0.02, 1e-9, 0);
    CHECK_NEAR(plan.cases[0].closed, 0.30, 1e-9, 0);
    CHECK_INT(plan.smallest_delay, 1);
    CHECK_STRING(plan.cases[1].name, "streaming");
    CHECK_NEAR(plan.cases[1].result.step, 0.24, 1e-9, 0);
    CHECK_STRING(plan.cases[2].name, "1f1b");
    CHECK_NEAR(plan.cases[2].result.step, 7 * 0.06, 1e-9, 0);
    CHECK_INT(plan.n_balances, 1);
    CHECK_NEAR(plan.balances[0].exact[2], 0.42 / 0.30, 1e-9, 0);
    CHECK_NEAR(plan.balances[0].stale[2], 0.42 / 0.24, 1e-9, 0);
    CHECK_INT(plan.balances[0].until_exact, POE_PLAN_MOST_MICRO);
    /* h of 2 x 32 x 32 floats and two tokens a position; shared: wte and lm_head of 512 x 32, and smear. */
    CHECK_NEAR(plan.cases[0].job.forward_bytes, 2 * 32 * (32 * 4 + 8), 0, 0);
    double shared = plan.cases[0].job.shared_bytes, matrices = 2 * 512 * 32 * 4;
    CHECK(shared >= matrices && shared < 1.01 * matrices);
    CHECK_NEAR(plan.down_bytes, 4 * plan.cases[0].job.forward_bytes + plan.cases[0].job.shared_bytes, 1e-12, 0);
    CHECK_NEAR(plan.up_bytes, plan.cases[0].job.shared_bytes, 1e-12, 0);
    for (int k = 0; k < 4; k++)
        CHECK(poe_run_memory_total(&plan.memory[k]) > 100000);
    strcpy(options.wire, "int8"); /* a byte each, and a scale a row */
    strcpy(options.wire_shared, "bf16");
    CHECK_INT(poe_plan_make(&settings, &plan), POE_OK);
    CHECK_NEAR(plan.cases[0].job.forward_bytes, 2 * 32 * (32 + 4 + 8), 0, 0);
    CHECK_NEAR(plan.cases[0].job.shared_bytes, shared / 2, 0, 0);
    poe_options_free(&options);

    options = options_of(more, 14);
    settings.options = &options;
    CHECK_INT(poe_plan_make(&settings, &plan), POE_OK);
    CHECK_INT(plan.n_cases, 1);
    CHECK_NEAR(plan.cases[0].result.step, 4 * 0.06 + 3 * 0.02, 1e-9, 0);
    CHECK_INT(plan.smallest_delay, 0);
    /* h and x0 both ways. */
    CHECK_NEAR(plan.cases[0].job.backward_bytes, 2 * 2 * 32 * 32 * 4, 0, 0);
    poe_options_free(&options);
}

/* One link of 2 s among four ranks: the default window is too narrow for what streams, and the plan widens it. */
static void test_long_link(void)
{
    static const char *const flags[] = {"--stages", "2,2,2,2", "--n-embd", "32", "--sequence-len", "32",
                                        "--device-batch-size", "2", "--total-batch-size", "64", "--sync", "stale:15",
                                        "--link-window", "15"};
    static poe_plan plan;
    poe_theory_rank times[4];
    poe_theory_link links[4] = {{0}, {.latency = 1}};
    for (int k = 0; k < 4; k++)
        times[k] = (poe_theory_rank){.forward = 0.05, .backward = 0.1};
    for (int given = 0; given <= 2; given++) {
        poe_options options = options_of(flags, 10 + 2 * given);
        poe_plan_settings settings = {.options = &options, .n_ranks = 4, .given = times, .down = links, .up = links};
        CHECK_INT(poe_plan_make(&settings, &plan), POE_OK);
        CHECK_INT(plan.smallest_delay, 15);
        CHECK_INT(plan.link_window, given == 2 ? 0 : 15);
        const poe_plan_case *streaming = &plan.cases[given < 2];
        CHECK_STRING(streaming->name, given < 2 ? "streaming" : "asked");
        CHECK_INT(streaming->job.delay, 15);
        CHECK_NEAR(streaming->result.step, 0.15, 1e-9, 0);
        poe_options_free(&options);
    }
}

/* Costs of parts add up to those of stages: local losses have a head each, bp has one at the end. */
static void test_parts(void)
{
    static const char *const flags[] = {"--stages", "3,1", "--n-embd", "32", "--sequence-len", "32",
                                        "--window-pattern", "L", "--device-batch-size", "2", "--total-batch-size", "128", "--threads", "1"};
    poe_options options = options_of(flags, 14);
    poe_calibration parts = {.embedding = {1, 2}, .head = {0, 10}};
    for (int i = 0; i < 4; i++)
        parts.layers[i / 2][i % 2] = (poe_part_time){100, 200};
    poe_plan_settings settings = {.options = &options, .n_ranks = 2, .calibration = &parts};
    static poe_plan plan;
    CHECK_INT(poe_plan_make(&settings, &plan), POE_OK);
    const poe_theory_rank *ranks = plan.cases[0].job.ranks;
    CHECK_NEAR(ranks[0].forward, 301, 1e-12, 0);
    CHECK_NEAR(ranks[0].backward, 612, 1e-12, 0);
    CHECK_NEAR(ranks[1].forward, 101, 1e-12, 0);
    CHECK_NEAR(ranks[1].backward, 212, 1e-12, 0);
    bool even = false, baseline = false;
    for (int i = 0; i < plan.n_cases; i++) {
        const poe_plan_case *c = &plan.cases[i];
        if (strcmp(c->name, "even") == 0) {
            even = true;
            check_layout(&c->layout, "2,2");
        }
        if (strcmp(c->name, "1f1b") == 0) {
            baseline = true;
            CHECK_NEAR(c->job.ranks[0].forward, 201, 1e-12, 0);
            CHECK_NEAR(c->job.ranks[0].backward, 402, 1e-12, 0);
            CHECK_NEAR(c->job.ranks[1].forward, 200, 1e-12, 0);
            CHECK_NEAR(c->job.ranks[1].backward, 410, 1e-12, 0);
        }
    }
    CHECK(even && baseline);
    poe_options_free(&options);
}

int main(void)
{
    test_even();
    test_given();
    test_long_link();
    test_parts();
    return check_result();
}
