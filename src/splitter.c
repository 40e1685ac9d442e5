/* SPDX-License-Identifier: MIT */
#include "src/splitter.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>

#include "src/log.h"

struct poe_pattern {
    pcre2_code *code;
};

struct poe_splitter {
    const pcre2_code *code;
    pcre2_match_context *context;
    pcre2_match_data *match;
    pcre2_jit_stack *stack;
    const char *text;
    size_t bytes;
    size_t at;                     /* where the next piece starts */
    size_t match_start, match_end; /* the last match; used up when `at` has reached its end */
};

static poe_status out_of_memory(void) {
    poe_error("out of memory for the tokenizer's split pattern");
    return POE_FAILED;
}

poe_status poe_pattern_compile(const char *expression, const char *owner, poe_pattern **pattern) {
    int error;
    PCRE2_SIZE offset;
    /* \C could cut a character in two. */
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)expression, PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, NULL);
    if (!code) {
        char why[128];
        pcre2_get_error_message(error, (PCRE2_UCHAR *)why, sizeof(why));
        poe_error("%s: the split pattern is wrong at byte %zu: %s", owner, (size_t)offset, why);
        return POE_BAD_INPUT;
    }
    uint32_t matches_empty = 0;
    pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) {
        pcre2_code_free(code);
        poe_error("%s: the split pattern may match an empty piece of text", owner);
        return POE_BAD_INPUT;
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE); /* without it, pcre2_match() interprets */
    *pattern = malloc(sizeof(**pattern));
    if (!*pattern) {
        pcre2_code_free(code);
        return out_of_memory();
    }
    (*pattern)->code = code;
    return POE_OK;
}

void poe_pattern_destroy(poe_pattern *pattern) {
    if (!pattern)
        return;
    pcre2_code_free(pattern->code);
    free(pattern);
}

poe_status poe_splitter_create(const poe_pattern *pattern, poe_splitter **splitter) {
    poe_splitter *s = calloc(1, sizeof(*s));
    if (!s)
        return out_of_memory();
    s->code = pattern->code;
    s->context = pcre2_match_context_create(NULL);
    s->match = pcre2_match_data_create(1, NULL);
    s->stack = pcre2_jit_stack_create((size_t)32 << 10, (size_t)8 << 20, NULL);
    if (!s->context || !s->match || !s->stack) {
        poe_splitter_destroy(s);
        return out_of_memory();
    }
    /* A long run of blanks is tried often before it ends; the limits would take that for an attack. */
    pcre2_set_match_limit(s->context, UINT32_MAX);
    pcre2_set_depth_limit(s->context, UINT32_MAX);
    pcre2_set_heap_limit(s->context, UINT32_MAX);
    pcre2_jit_stack_assign(s->context, NULL, s->stack);
    *splitter = s;
    return POE_OK;
}

void poe_splitter_destroy(poe_splitter *splitter) {
    if (!splitter)
        return;
    pcre2_jit_stack_free(splitter->stack);
    pcre2_match_data_free(splitter->match);
    pcre2_match_context_free(splitter->context);
    free(splitter);
}

void poe_splitter_start(poe_splitter *splitter, const char *text, size_t bytes) {
    splitter->text = bytes ? text : "";
    splitter->bytes = bytes;
    splitter->at = splitter->match_start = splitter->match_end = 0;
}

/* Finds the first match at or after `at`. PCRE2 checks that the text is UTF-8 when it is first called on it. */
static poe_status find_match(poe_splitter *s) {
    uint32_t options = PCRE2_NOTEMPTY | (s->at ? PCRE2_NO_UTF_CHECK : 0);
    int rc = pcre2_match(s->code, (PCRE2_SPTR)s->text, s->bytes, s->at, options, s->match, s->context);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(s->code, (PCRE2_SPTR)s->text, s->bytes, s->at, options | PCRE2_NO_JIT, s->match, s->context);
    if (rc == PCRE2_ERROR_NOMATCH) {
        s->match_start = s->match_end = s->bytes;
        return POE_OK;
    }
    if (rc <= PCRE2_ERROR_UTF8_ERR1 && rc >= PCRE2_ERROR_UTF8_ERR21)
        return POE_BAD_INPUT;
    if (rc < 0) {
        char why[128];
        pcre2_get_error_message(rc, (PCRE2_UCHAR *)why, sizeof(why));
        poe_error("cannot split text at byte %zu: %s", s->at, why);
        return POE_FAILED;
    }
    const PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(s->match);
    s->match_start = bounds[0];
    s->match_end = bounds[1];
    return POE_OK;
}

poe_status poe_splitter_next(poe_splitter *splitter, const char **piece, size_t *length) {
    if (splitter->at == splitter->bytes)
        return POE_END;
    if (splitter->at >= splitter->match_end) {
        poe_status status = find_match(splitter);
        if (status == POE_BAD_INPUT)
            *length = pcre2_get_startchar(splitter->match);
        if (status != POE_OK)
            return status;
    }
    size_t end = splitter->at < splitter->match_start ? splitter->match_start : splitter->match_end;
    *piece = splitter->text + splitter->at;
    *length = end - splitter->at;
    splitter->at = end;
    return POE_OK;
}
