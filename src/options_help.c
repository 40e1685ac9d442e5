/* SPDX-License-Identifier: MIT
 * --help: groups, aligned, at most 100 columns. */
#include <stdio.h>
#include <string.h>

#include "src/options_table.h"

enum { HELP_COLUMN = 34, HELP_WIDTH = 99 };

static const char *const usages[] = {
    [POE_COMMAND_TRAIN] = "Usage: poe-pipe [flags]                       train (all flags below)\n"
                          "       poe-pipe generate --checkpoint DIR --prompt TEXT\n"
                          "       poe-pipe inspect PATH                  what a checkpoint or a file of one holds\n"
                          "       poe-pipe export --checkpoint DIR --export FILE.safetensors\n"
                          "       poe-pipe data --data FILE --out DIR    tokenizer and token shards from text\n"
                          "       poe-pipe plan [flags]                  what a run would be like: speed, waiting, memory\n"
                          "\n"
                          "Trains a GPT that is cut into stages. Every rank owns one stage and trains it from its own\n"
                          "loss; activations stream forward, gradients never come back.\n",
    [POE_COMMAND_GENERATE] = "Usage: poe-pipe generate --checkpoint DIR --prompt TEXT [flags]\n"
                             "\n"
                             "Goes on from a text with all stages together, one stage, or the first ones.\n",
    [POE_COMMAND_INSPECT] = "Usage: poe-pipe inspect PATH\n"
                            "\n"
                            "Shows what a checkpoint, or one of its files, holds, and whether it is whole.\n",
    [POE_COMMAND_EXPORT] = "Usage: poe-pipe export --checkpoint DIR --export FILE.safetensors [flags]\n"
                           "\n"
                           "Writes the weights of a checkpoint with nanochat's names.\n",
    [POE_COMMAND_DATA] = "Usage: poe-pipe data --data FILE --out DIR [flags]\n"
                         "\n"
                         "Trains or reads a tokenizer and writes OUT/tokenizer.json, OUT/train.bin and OUT/val.bin.\n",
    [POE_COMMAND_PLAN] = "Usage: poe-pipe plan [flags]\n"
                         "\n"
                         "Predicts step time, waiting, memory and traffic of the run that has these flags, by its schedule's\n"
                         "graph, from the speed of this machine's kernels or from given times (--emulate-compute); beside other\n"
                         "stages, --sync stale:D and 1f1b. --ranks N asks for N even stages of the same layers. Flags that have\n"
                         "no part in this are taken and left alone.\n",
};

static const char *const examples[] = {
    [POE_COMMAND_TRAIN] =
        "  poe-pipe --ranks 4 --stages 16,6,5,5             four ranks here, on the text that ships\n"
        "  mpiexec -n 4 poe-pipe --stages 16,6,5,5          the same by hand (source mpi.env first)\n"
        "  poe-pipe --stages 2,2,2 --data book.txt          one process, a thread per stage\n"
        "  poe-pipe --size 3b --dry-run                     parameters and memory per rank, no more\n"
        "  poe-pipe --ranks 4 --resume latest --out runs/a  go on where a run stopped\n"
        "  poe-pipe --config run.json --num-iterations 500  flags from a file, one of them changed\n"
        "\n"
        "Signals: Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops (status 130, 143); a\n"
        "second one ends at once. SIGUSR2 makes every rank say what it waits for.\n",
    [POE_COMMAND_GENERATE] = "  poe-pipe generate --checkpoint runs/a --prompt \"To be\"\n"
                             "  poe-pipe generate --checkpoint runs/a --prompt \"To be\" --prefix 1 --temperature 0\n",
    [POE_COMMAND_INSPECT] = "  poe-pipe inspect runs/a/checkpoints/step-00000130\n",
    [POE_COMMAND_EXPORT] = "  poe-pipe export --checkpoint runs/a --export a.safetensors --export-dtype bf16\n",
    [POE_COMMAND_DATA] = "  poe-pipe data --data book.txt --out data/book --vocab-size 4096\n"
                         "  poe-pipe data --data a.jsonl --data b.jsonl --tokenizer tokenizer.json --out data/ab\n",
    [POE_COMMAND_PLAN] = "  poe-pipe plan --stages 4,4,4,4 --net '*-*:rtt=80ms,bw=1Gbit'\n"
                         "  poe-pipe plan --stages 2x96 --emulate-compute forward=20ms,backward=40ms --json\n",
};

/* Prints `text` from HELP_COLUMN on, broken between words. */
static void print_wrapped(const char *text)
{
    int column = HELP_COLUMN;
    for (const char *word = text; *word;) {
        int length = (int)strcspn(word, " ");
        bool first = word == text, breaks = column + 1 + length > HELP_WIDTH;
        if (breaks)
            printf("\n%*s", HELP_COLUMN, "");
        column = breaks ? HELP_COLUMN : column;
        column += printf("%s%.*s", first || breaks ? "" : " ", length, word);
        word += length + (int)strspn(word + length, " ");
    }
    putchar('\n');
}

static void print_option(const poe_option *option)
{
    char left[128], right[512];
    const char *argument = option->argument ? option->argument : "";
    bool number = option->fallback && *option->fallback != '-';
    snprintf(left, sizeof(left), "  --%s %s", option->name, argument);
    if (number)
        snprintf(right, sizeof(right), "%s [%s]", option->help, option->fallback);
    else
        snprintf(right, sizeof(right), "%s", option->help);
    if (strlen(left) > HELP_COLUMN - 2)
        printf("%s\n%*s", left, HELP_COLUMN, "");
    else
        printf("%-*s", HELP_COLUMN, left);
    print_wrapped(right);
}

void poe_options_help(poe_command command)
{
    const char *group = "";
    printf("%s", usages[command]);
    for (int i = 0; i < poe_option_count; i++) {
        const poe_option *option = &poe_option_table[i];
        if (!(option->commands & (1u << command)))
            continue;
        if (strcmp(option->group, group) != 0)
            printf("\n%s:\n", option->group);
        group = option->group;
        print_option(option);
    }
    printf("\nExamples:\n%s", examples[command]);
}
