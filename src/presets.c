/* SPDX-License-Identifier: MIT
 * --size: the models of the papers and model cards. What their tables leave open (897m's and 286m's batch) is
 * nanochat's reference batch, at which no rate is rescaled. */
#include <string.h>

#include "src/options_table.h"

typedef struct setting {
    const char *size, *name, *value;
} setting;

static const setting settings[] = {
    {"tiny", "stages", "2,2,2"},
    {"tiny", "n-embd", "384"},
    {"tiny", "n-head", "6"},
    {"tiny", "n-kv-head", "6"},
    {"tiny", "mlp-dim", "1536"},
    {"tiny", "sequence-len", "512"},

    {"286m", "stages", "4,4,4"},
    {"286m", "head", "ps"},
    {"286m", "n-embd", "768"},
    {"286m", "n-head", "12"},
    {"286m", "n-kv-head", "12"},
    {"286m", "mlp-dim", "3072"},
    {"286m", "sequence-len", "1024"},
    {"286m", "vocab-size", "32768"},
    {"286m", "num-iterations", "2365"},
    {"286m", "total-batch-size", "524288"},

    {"897m", "stages", "5,5,5,5"},
    {"897m", "n-embd", "1280"},
    {"897m", "n-head", "10"},
    {"897m", "n-kv-head", "10"},
    {"897m", "mlp-dim", "5120"},
    {"897m", "sequence-len", "2048"},
    {"897m", "vocab-size", "32768"},
    {"897m", "total-batch-size", "524288"},

    {"1.3b", "stages", "6,6,6,6"},
    {"1.3b", "n-embd", "1536"},
    {"1.3b", "n-head", "12"},
    {"1.3b", "n-kv-head", "12"},
    {"1.3b", "mlp-dim", "6144"},
    {"1.3b", "sequence-len", "2048"},
    {"1.3b", "vocab-size", "32768"},
    {"1.3b", "total-batch-size", "1048576"},

    {"3b", "stages", "16,6,5,5"},
    {"3b", "head", "ps"},
    {"3b", "n-embd", "2048"},
    {"3b", "n-head", "16"},
    {"3b", "n-kv-head", "8"},
    {"3b", "mlp-dim", "12800"},
    {"3b", "sequence-len", "2048"},
    {"3b", "vocab-size", "32768"},
    {"3b", "total-batch-size", "786432"},
    {"3b", "matrix-lr", "0.015"},
    {"3b", "warmup-steps", "1000"},
};

poe_status poe_preset_apply(poe_options *options, const char *name)
{
    for (size_t i = 0; i < sizeof(settings) / sizeof(settings[0]); i++) {
        if (strcmp(settings[i].size, name) != 0)
            continue;
        const poe_option *option = poe_option_find(settings[i].name, strlen(settings[i].name));
        poe_status status = poe_option_set(options, option, settings[i].value, "--size");
        if (status != POE_OK)
            return status;
    }
    return POE_OK;
}
