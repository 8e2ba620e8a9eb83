/*
 * apreqel-quantize: write a quantised GGUF from a job table, with ggml's own quantisers, and where
 * second moments of activations are given rounded anew from there (rounding.c).
 *
 *     apreqel-quantize JOB
 *
 * The table is made and validated by apreqel/quantize.py, which also checks the finished file and
 * moves it to its place; every extent is checked here again, against the real sizes of the files.
 * It is text, one field a line, in this order:
 *
 *     apreqel-quantize 3           format and its version
 *     threads N                    worker threads, 1 to 256
 *     alignment A                  of tensor data, a power of two
 *     size BYTES                   of the finished file
 *     ggml PATH                    libggml-base of the installed llama-cpp-python
 *     header PATH                  the finished file's header, padded to the alignment
 *     imatrix PATH|-               float32 importance weights of all tensors, one after another
 *     temp PATH                    the file to make; nothing may be there. It stays, whole and on
 *                                  disk, if all goes well, and is removed if not
 *     source BYTES PATH            a model file (a line for each shard)
 *     moments LENGTH PATH          second moments: float32, LENGTH x LENGTH; any number of lines
 *     tensor FILE FROM TYPE TO TYPE ROWS MATRIX_ROWS ROW_LENGTH IMATRIX MOMENTS NAME
 *                                  source file (0 is the first), offset and ggml type id in it;
 *                                  offset and type id in the output; rows in all; rows of one
 *                                  matrix (expert); weights a row; where its importance weights
 *                                  start in the imatrix, in floats, or -1; which second moments
 *                                  it is rounded with (0 is the first), or -1; name for messages
 *     end
 *
 * Workers take blocks of rows: read, widen to float32, quantise, validate, write. A block never
 * spans two matrices, and ggml quantises each row by itself, so the bytes do not depend on the
 * number of threads. Memory is bounded by the block size, whatever the model; second moments are
 * mapped, those of about one tensor at a time in use.
 *
 * Progress and the result are JSON lines on stdout. Exit status: 0 done, or one of enum failure. A
 * failure's last line is {"event":"error","code":STATUS,"message":TEXT}, with the fields "tensor",
 * "row" (of that tensor, from 0), "line" (of the job table, from 1) and "errno" where they apply.
 */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include "rounding.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/prctl.h>
#endif

enum failure {
    FAIL_JOB = 20,    /* the job table is wrong */
    FAIL_SOURCE,      /* a model file cannot be read, or was changed while in use */
    FAIL_IO,          /* another file cannot be read, or the temp file not written */
    FAIL_DATA,        /* NaN or Inf in the weights */
    FAIL_GGML,        /* ggml is missing or did what it must not */
    FAIL_MEMORY,      /* out of memory, or of threads */
    FAIL_INTERRUPTED, /* by SIGINT or SIGTERM */
};

/* Weights in a block: 2 MiB of float32, so that a worker's buffers take about 5 MiB. */
#define BLOCK_WEIGHTS (1 << 19)
/* A block that is rounded by second moments: products of a pass over it, and its fewest rows. */
#define ROUNDING_PRODUCTS (1LL << 30)
#define ROUNDING_ROWS 16
#define MAX_THREADS 256
#define MAX_SOURCES 100000
#define MAX_LENGTH (1 << 20)
#define MAX_LINE (64 << 10)
/* Whatever is at its name is neither overwritten nor, a symlink, followed. */
#define NEW_FILE (O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC)
/* The main thread looks 200 times a second whether all is done, and reports 5 times. */
#define POLL_NANOSECONDS 5000000L
#define POLLS_PER_PROGRESS 40

/* ------------------------------------------------------------------------------------------ */
/* ggml: the few functions of libggml-base that are used (ggml.h), found with dlopen           */

struct type_traits { /* struct ggml_type_traits */
    const char *type_name;
    int64_t block_size;
    int64_t block_size_interleave;
    size_t type_size; /* bytes a block */
    bool is_quantized;
    void (*to_float)(const void *, float *, int64_t);
};

struct ggml {
    const struct type_traits *(*get_type_traits)(int type);
    int64_t (*blck_size)(int type);
    size_t (*type_size)(int type);
    void (*fp16_to_fp32_row)(const void *, float *, int64_t);
    void (*bf16_to_fp32_row)(const void *, float *, int64_t);
    void (*quantize_init)(int type);
    bool (*quantize_requires_imatrix)(int type);
    size_t (*quantize_chunk)(int type, const float *, void *, int64_t start, int64_t rows,
                             int64_t row_length, const float *imatrix);
    bool (*validate_row_data)(int type, const void *, size_t bytes);
    struct half_conversions half;
};

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_BF16 = 30, TYPE_ID_LIMIT = 256 };

/* ------------------------------------------------------------------------------------------ */
/* The job                                                                                      */

struct source {
    char *path;
    int64_t size; /* bytes */
    int fd;
};

struct moments {
    char *path;
    int64_t length;      /* of rows and columns */
    const float *values; /* mapped; NULL until then */
};

struct tensor {
    char *name;
    int source;             /* index into job.sources */
    int moments;            /* index into job.moments, or -1 */
    int from_type, to_type; /* ggml type ids */
    int64_t from, to;       /* byte offsets in the source and in the output */
    int64_t rows;           /* of all its matrices */
    int64_t matrix_rows;    /* rows of one matrix */
    int64_t row_length;     /* weights */
    int64_t imatrix;        /* first float of its importance weights, or -1 */
    size_t from_row, to_row; /* bytes a row */
    int64_t block_rows;     /* rows a block */
    int64_t first_block;    /* index of its first block among all blocks of the job */
};

struct job {
    int64_t threads, alignment, size;
    char *ggml_path, *header_path, *imatrix_path, *temp_path;
    struct source *sources;
    int n_sources;
    struct moments *moments;
    int n_moments;
    struct tensor *tensors;
    int n_tensors, tensors_capacity;
    int64_t n_blocks;
    int64_t total_bytes; /* of tensor data to write */
    float *imatrix;
    int64_t n_imatrix; /* floats */
    struct ggml ggml;
    int output_fd;
    bool temp_is_ours; /* to be removed if the job fails */
    /* shared by the workers */
    atomic_llong next_block, done_bytes;
    atomic_int stop;   /* set by the first failure or a signal */
    atomic_int active; /* workers still running */
    pthread_mutex_t failure_lock;
    int failure;             /* enum failure, 0 while all is well */
    char failure_text[2048]; /* JSON fields of the first failure */
};

static volatile sig_atomic_t g_signalled = 0;

static void on_signal(int number) {
    (void)number;
    g_signalled = 1;
}

/* ------------------------------------------------------------------------------------------ */
/* Messages                                                                                     */

/* Where a failure lies and why; only what applies is reported. */
struct where {
    const char *tensor; /* or NULL */
    int64_t row;        /* or -1 */
    int64_t line;       /* or 0 */
    int error;          /* errno, or 0 */
};

static const struct where NOWHERE = {NULL, -1, 0, 0};

static struct where at_line(int64_t line) { return (struct where){NULL, -1, line, 0}; }

static struct where in_tensor(const struct tensor *t) { return (struct where){t->name, -1, 0, 0}; }

/* Copy `text` for a JSON string; what is cut off is cut between characters. */
static void json_escape(char *out, size_t capacity, const char *text) {
    size_t n = 0;
    while (*text && n + 8 < capacity) {
        unsigned char c = (unsigned char)*text;
        size_t length = c < 0xC0 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4, bytes = 1;
        while (bytes < length && ((unsigned char)text[bytes] & 0xC0) == 0x80) {
            bytes++;
        }
        if (bytes < length && !text[bytes]) {
            break; /* `text` itself was cut within a character */
        }
        if (c < 0x20) {
            n += (size_t)snprintf(out + n, capacity - n, "\\u%04x", c);
        } else {
            if (c == '"' || c == '\\') {
                out[n++] = '\\';
            }
            memcpy(out + n, text, bytes);
            n += bytes;
        }
        text += bytes;
    }
    out[n] = 0;
}

/* Record the first failure; later ones are its consequences. */
static int fail(struct job *job, enum failure failure, struct where where, const char *format,
                ...) {
    char text[1024], escaped[1280], tensor[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    json_escape(escaped, sizeof escaped, text);
    json_escape(tensor, sizeof tensor, where.tensor ? where.tensor : "");
    pthread_mutex_lock(&job->failure_lock);
    if (!job->failure) {
        char *to = job->failure_text; /* has room for all fields at their longest */
        job->failure = failure;
        to += sprintf(to, "\"message\":\"%s\"", escaped);
        to += where.tensor ? sprintf(to, ",\"tensor\":\"%s\"", tensor) : 0;
        to += where.row >= 0 ? sprintf(to, ",\"row\":%" PRId64, where.row) : 0;
        to += where.line ? sprintf(to, ",\"line\":%" PRId64, where.line) : 0;
        to += where.error ? sprintf(to, ",\"errno\":%d", where.error) : 0;
    }
    pthread_mutex_unlock(&job->failure_lock);
    atomic_store(&job->stop, 1);
    return -1;
}

static int fail_errno(struct job *job, enum failure failure, const char *what, const char *path) {
    struct where where = {NULL, -1, 0, errno};
    return fail(job, failure, where, "cannot %s %s", what, path);
}

static int fail_memory(struct job *job, const char *what) {
    return fail(job, FAIL_MEMORY, NOWHERE, "out of memory for %s", what);
}

/* ------------------------------------------------------------------------------------------ */
/* Reading the job table                                                                        */

static bool multiply(int64_t a, int64_t b, int64_t *product) {
    return a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, product);
}

static bool add(int64_t a, int64_t b, int64_t *sum) {
    return a >= 0 && b >= 0 && !__builtin_add_overflow(a, b, sum);
}

/* Take a whole number in [least, most] off the front of *text. */
static bool take_number(char **text, int64_t least, int64_t most, int64_t *value) {
    char *end;
    if (**text != '-' && (**text < '0' || **text > '9')) {
        return false;
    }
    errno = 0;
    long long number = strtoll(*text, &end, 10);
    if (errno || end == *text || (*end != ' ' && *end != 0) || number < least || number > most) {
        return false;
    }
    *value = number;
    *text = *end ? end + 1 : end;
    return true;
}

/* The rest of `line` after "key ", or NULL. */
static char *field(char *line, const char *key) {
    size_t n = strlen(key);
    return !strncmp(line, key, n) && line[n] == ' ' ? line + n + 1 : NULL;
}

static int parse_tensor(struct job *job, char *text, int64_t line) {
    if (job->n_tensors == job->tensors_capacity) {
        int capacity = job->tensors_capacity ? 2 * job->tensors_capacity : 256;
        if (capacity > (1 << 24)) {
            return fail(job, FAIL_JOB, at_line(line), "too many tensors");
        }
        struct tensor *grown = realloc(job->tensors, (size_t)capacity * sizeof *grown);
        if (!grown) {
            return fail_memory(job, "the job table");
        }
        job->tensors = grown;
        job->tensors_capacity = capacity;
    }
    struct tensor *t = &job->tensors[job->n_tensors];
    int64_t source, from_type, to_type, moments;
    memset(t, 0, sizeof *t);
    bool good = take_number(&text, 0, job->n_sources - 1, &source) &&
                take_number(&text, 0, INT64_MAX, &t->from) &&
                take_number(&text, 0, TYPE_ID_LIMIT - 1, &from_type) &&
                take_number(&text, 0, INT64_MAX, &t->to) &&
                take_number(&text, 0, TYPE_ID_LIMIT - 1, &to_type) &&
                take_number(&text, 1, INT64_MAX, &t->rows) &&
                take_number(&text, 1, INT64_MAX, &t->matrix_rows) &&
                take_number(&text, 1, INT64_MAX / 8, &t->row_length) &&
                take_number(&text, -1, INT64_MAX, &t->imatrix) &&
                take_number(&text, -1, job->n_moments - 1, &moments) && *text;
    if (!good || t->rows % t->matrix_rows) {
        return fail(job, FAIL_JOB, at_line(line), "not a tensor");
    }
    t->source = (int)source;
    t->moments = (int)moments;
    t->from_type = (int)from_type;
    t->to_type = (int)to_type;
    t->name = strdup(text);
    if (!t->name) {
        return fail_memory(job, "the job table");
    }
    job->n_tensors++;
    return 0;
}

static int parse_source(struct job *job, char *text, int64_t line) {
    int64_t size;
    if (job->n_sources >= MAX_SOURCES || !take_number(&text, 1, INT64_MAX, &size) || !*text) {
        return fail(job, FAIL_JOB, at_line(line), "not a source");
    }
    struct source *grown = realloc(job->sources, (size_t)(job->n_sources + 1) * sizeof *grown);
    char *path = strdup(text);
    if (grown) {
        job->sources = grown;
    }
    if (!grown || !path) {
        free(path);
        return fail_memory(job, "the job table");
    }
    job->sources[job->n_sources++] = (struct source){path, size, -1};
    return 0;
}

static int parse_moments(struct job *job, char *text, int64_t line) {
    int64_t length;
    if (job->n_moments >= MAX_SOURCES || !take_number(&text, 1, MAX_LENGTH, &length) || !*text) {
        return fail(job, FAIL_JOB, at_line(line), "not second moments");
    }
    struct moments *grown = realloc(job->moments, (size_t)(job->n_moments + 1) * sizeof *grown);
    char *path = strdup(text);
    if (grown) {
        job->moments = grown;
    }
    if (!grown || !path) {
        free(path);
        return fail_memory(job, "the job table");
    }
    job->moments[job->n_moments++] = (struct moments){path, length, NULL};
    return 0;
}

static int parse_line(struct job *job, char *text, int64_t line, bool *ended) {
    static const char *const keys[] = {"threads", "alignment", "size", "ggml",
                                       "header",  "imatrix",   "temp"};
    static const int64_t most[] = {MAX_THREADS, 1 << 20, INT64_MAX};
    int64_t *numbers[] = {&job->threads, &job->alignment, &job->size};
    char **paths[] = {&job->ggml_path, &job->header_path, &job->imatrix_path, &job->temp_path};
    char *rest;
    if (line == 1) {
        return strcmp(text, "apreqel-quantize 3")
                   ? fail(job, FAIL_JOB, at_line(line), "not a job table of version 3")
                   : 0;
    }
    if (line - 2 < 7) {
        int64_t i = line - 2;
        if (!(rest = field(text, keys[i])) || !*rest) {
            return fail(job, FAIL_JOB, at_line(line), "expected %s", keys[i]);
        }
        if (i < 3) {
            bool good = take_number(&rest, 1, most[i], numbers[i]) && !*rest;
            return good ? 0 : fail(job, FAIL_JOB, at_line(line), "bad %s", keys[i]);
        }
        *paths[i - 3] = strdup(rest);
        return *paths[i - 3] ? 0 : fail_memory(job, "the job table");
    }
    if ((rest = field(text, "source")) && !job->n_tensors) {
        return parse_source(job, rest, line);
    }
    if ((rest = field(text, "moments")) && !job->n_tensors) {
        return parse_moments(job, rest, line);
    }
    if ((rest = field(text, "tensor"))) {
        return parse_tensor(job, rest, line);
    }
    if (!strcmp(text, "end")) {
        *ended = true;
        return 0;
    }
    return fail(job, FAIL_JOB, at_line(line), "not understood");
}

static int parse_job(struct job *job, const char *path) {
    FILE *file = fopen(path, "r");
    char *text = malloc(MAX_LINE);
    bool ended = false;
    int result = 0;
    if (!text) {
        result = fail_memory(job, "the job table");
    } else if (!file) {
        result = fail_errno(job, FAIL_IO, "open", path);
    }
    for (int64_t line = 1; !result && !ended && fgets(text, MAX_LINE, file); line++) {
        size_t n = strlen(text);
        if (!n || text[n - 1] != '\n') {
            result = fail(job, FAIL_JOB, at_line(line), "too long or cut");
            break;
        }
        text[n - 1] = 0;
        result = parse_line(job, text, line, &ended);
    }
    if (!result && (!ended || !job->n_sources || (job->alignment & (job->alignment - 1)))) {
        result = fail(job, FAIL_JOB, NOWHERE, "the job table is not complete");
    }
    free(text);
    if (file) {
        fclose(file);
    }
    return result;
}

/* ------------------------------------------------------------------------------------------ */
/* Files and ggml                                                                               */

/* `failure` is what it means that `path` cannot be read. */
static int read_whole(struct job *job, enum failure failure, int fd, const char *path, void *buffer,
                      size_t size, int64_t offset) {
    char *to = buffer;
    while (size) {
        ssize_t n = pread(fd, to, size, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return fail_errno(job, failure, "read", path);
        }
        if (n == 0) {
            return fail(job, failure, NOWHERE, "cut short while in use: %s", path);
        }
        to += n;
        offset += n;
        size -= (size_t)n;
    }
    return 0;
}

static int write_whole(struct job *job, const void *buffer, size_t size, int64_t offset) {
    const char *from = buffer;
    while (size) {
        ssize_t n = pwrite(job->output_fd, from, size, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            errno = n == 0 ? ENOSPC : errno;
            return fail_errno(job, FAIL_IO, "write", job->temp_path);
        }
        from += n;
        offset += n;
        size -= (size_t)n;
    }
    return 0;
}

static int open_ggml(struct job *job) {
    void *library = dlopen(job->ggml_path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        return fail(job, FAIL_GGML, NOWHERE, "%s", dlerror());
    }
    const struct {
        const char *name;
        void *slot;
    } wanted[] = {
        {"ggml_get_type_traits", &job->ggml.get_type_traits},
        {"ggml_blck_size", &job->ggml.blck_size},
        {"ggml_type_size", &job->ggml.type_size},
        {"ggml_fp16_to_fp32_row", &job->ggml.fp16_to_fp32_row},
        {"ggml_bf16_to_fp32_row", &job->ggml.bf16_to_fp32_row},
        {"ggml_fp16_to_fp32", &job->ggml.half.to_float},
        {"ggml_fp32_to_fp16", &job->ggml.half.from_float},
        {"ggml_quantize_init", &job->ggml.quantize_init},
        {"ggml_quantize_requires_imatrix", &job->ggml.quantize_requires_imatrix},
        {"ggml_quantize_chunk", &job->ggml.quantize_chunk},
        {"ggml_validate_row_data", &job->ggml.validate_row_data},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(library, wanted[i].name);
        if (!symbol) {
            return fail(job, FAIL_GGML, NOWHERE, "%s: has no %s", job->ggml_path, wanted[i].name);
        }
        memcpy(wanted[i].slot, &symbol, sizeof symbol); /* a function pointer from a void pointer */
    }
    return 0;
}

/* Bytes of a row in a type; refuses types that ggml does not have or rows they cannot hold. */
static int row_bytes(struct job *job, const struct tensor *t, int type, size_t *bytes) {
    int64_t block = job->ggml.blck_size(type), size;
    if (block <= 0 || t->row_length % block) {
        return fail(job, FAIL_JOB, in_tensor(t), "rows of %" PRId64 " do not fit type %d",
                    t->row_length, type);
    }
    if (!multiply(t->row_length / block, (int64_t)job->ggml.type_size(type), &size) || size <= 0 ||
        size > INT32_MAX) {
        return fail(job, FAIL_JOB, in_tensor(t), "rows of %" PRId64 " are too long", t->row_length);
    }
    *bytes = (size_t)size;
    return 0;
}

static int check_tensor(struct job *job, struct tensor *t, int64_t *written_to) {
    int64_t from_bytes, to_bytes, from_end, to_end, importance, padded;
    if (row_bytes(job, t, t->from_type, &t->from_row) || row_bytes(job, t, t->to_type, &t->to_row)) {
        return -1;
    }
    bool fits = multiply(t->rows, (int64_t)t->from_row, &from_bytes) &&
                multiply(t->rows, (int64_t)t->to_row, &to_bytes) &&
                add(t->from, from_bytes, &from_end) && add(t->to, to_bytes, &to_end) &&
                add(to_end, job->alignment - 1, &padded) &&
                from_end <= job->sources[t->source].size && to_end <= job->size &&
                t->to % job->alignment == 0 && t->to == *written_to;
    if (!fits) {
        return fail(job, FAIL_JOB, in_tensor(t), "its extent does not fit the files");
    }
    *written_to = padded & ~(job->alignment - 1);
    if (t->imatrix >= 0) {
        bool inside = multiply(t->rows / t->matrix_rows, t->row_length, &importance) &&
                      add(t->imatrix, importance, &importance) && importance <= job->n_imatrix;
        if (!inside) {
            return fail(job, FAIL_JOB, in_tensor(t), "its importance weights are not in the imatrix");
        }
    }
    if (t->from_type != t->to_type) {
        const struct type_traits *traits = job->ggml.get_type_traits(t->from_type);
        bool is_float =
            t->from_type == TYPE_F32 || t->from_type == TYPE_F16 || t->from_type == TYPE_BF16;
        if (!is_float && (traits->block_size != job->ggml.blck_size(t->from_type) ||
                          traits->type_size != job->ggml.type_size(t->from_type) ||
                          !traits->to_float)) {
            return fail(job, FAIL_GGML, in_tensor(t), "ggml cannot read type %d", t->from_type);
        }
        if (job->ggml.quantize_requires_imatrix(t->to_type) && t->imatrix < 0) {
            return fail(job, FAIL_JOB, in_tensor(t), "type %d needs an imatrix", t->to_type);
        }
        job->ggml.quantize_init(t->to_type);
    }
    if (t->moments >= 0 &&
        (t->from_type == t->to_type || !rounding_knows(t->to_type) ||
         job->moments[t->moments].length != t->row_length)) {
        return fail(job, FAIL_JOB, in_tensor(t), "its second moments are not for it");
    }
    int64_t rows = BLOCK_WEIGHTS / t->row_length;
    if (t->moments >= 0) { /* takes time by the square of their length; a stop has to wait for it */
        int64_t most = ROUNDING_PRODUCTS / t->row_length / t->row_length;
        most = most < ROUNDING_ROWS ? ROUNDING_ROWS : most;
        rows = rows < most ? rows : most;
    }
    t->block_rows = rows < 1 ? 1 : rows < t->matrix_rows ? rows : t->matrix_rows;
    t->first_block = job->n_blocks;
    int64_t per_matrix = (t->matrix_rows - 1) / t->block_rows + 1;
    int64_t blocks;
    if (!multiply(per_matrix, t->rows / t->matrix_rows, &blocks) ||
        !add(job->n_blocks, blocks, &job->n_blocks)) {
        return fail(job, FAIL_JOB, in_tensor(t), "too many rows");
    }
    job->total_bytes += to_bytes;
    return 0;
}

/* All of a file that apreqel made for this job, or NULL. */
static void *read_file(struct job *job, const char *path, int64_t *size) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info)) {
        fail_errno(job, FAIL_IO, "open", path);
        return NULL;
    }
    *size = (int64_t)info.st_size;
    void *content = malloc((size_t)info.st_size + 1);
    if (!content) {
        fail_memory(job, path);
    } else if (read_whole(job, FAIL_IO, fd, path, content, (size_t)info.st_size, 0)) {
        free(content);
        content = NULL;
    }
    close(fd);
    return content;
}

static int map_moments(struct job *job, struct moments *m) {
    struct stat info;
    int fd = open(m->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info)) {
        return fail_errno(job, FAIL_IO, "open", m->path);
    }
    size_t size = (size_t)m->length * (size_t)m->length * sizeof(float);
    if (info.st_size < 0 || (size_t)info.st_size != size) {
        close(fd);
        return fail(job, FAIL_JOB, NOWHERE, "not %" PRId64 " second moments a row: %s", m->length,
                    m->path);
    }
    void *values = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (values == MAP_FAILED) {
        return fail_errno(job, FAIL_IO, "map", m->path);
    }
    m->values = values;
    return 0;
}

static int open_files(struct job *job) {
    struct stat info;
    for (int i = 0; i < job->n_sources; i++) {
        struct source *source = &job->sources[i];
        source->fd = open(source->path, O_RDONLY | O_CLOEXEC);
        if (source->fd < 0 || fstat(source->fd, &info)) {
            return fail_errno(job, FAIL_SOURCE, "open", source->path);
        }
        if ((int64_t)info.st_size != source->size) {
            return fail(job, FAIL_SOURCE, NOWHERE, "changed while in use: %s", source->path);
        }
    }
    for (int i = 0; i < job->n_moments; i++) {
        if (map_moments(job, &job->moments[i])) {
            return -1;
        }
    }
    if (strcmp(job->imatrix_path, "-")) {
        int64_t size = 0;
        job->imatrix = read_file(job, job->imatrix_path, &size);
        job->n_imatrix = size / (int64_t)sizeof(float);
        return job->imatrix ? 0 : -1;
    }
    return 0;
}

/* Make the temp file at its full size, with the header in it; the padding stays zero. */
static int start_output(struct job *job, int64_t *data_start) {
    char *header = read_file(job, job->header_path, data_start);
    if (!header) {
        return -1;
    }
    int result;
    if (*data_start > job->size || *data_start % job->alignment) {
        result = fail(job, FAIL_JOB, NOWHERE, "the header has %" PRId64 " bytes", *data_start);
    } else if ((job->output_fd = open(job->temp_path, NEW_FILE, 0666)) < 0) {
        result = fail_errno(job, FAIL_IO, "make", job->temp_path);
    } else {
        job->temp_is_ours = true;
        result = ftruncate(job->output_fd, (off_t)job->size)
                     ? fail_errno(job, FAIL_IO, "set the size of", job->temp_path)
                     : write_whole(job, header, (size_t)*data_start, 0);
    }
    free(header);
    return result;
}

static int finish_output(struct job *job) {
    if (fsync(job->output_fd)) {
        return fail_errno(job, FAIL_IO, "sync", job->temp_path);
    }
    int fd = job->output_fd;
    job->output_fd = -1;
    if (close(fd)) {
        return fail_errno(job, FAIL_IO, "close", job->temp_path);
    }
    if (g_signalled) { /* while it was synced: nobody may be left who wants the file */
        return fail(job, FAIL_INTERRUPTED, NOWHERE, "interrupted");
    }
    job->temp_is_ours = false;
    return 0;
}

/* ------------------------------------------------------------------------------------------ */
/* The work                                                                                     */

struct buffers {
    char *from, *to; /* a block in the source's and in the target's type */
    float *values;   /* the block in float32 */
    void *rounding;  /* what rounding.c works with */
};

static const struct tensor *tensor_of_block(const struct job *job, int64_t block) {
    int low = 0, high = job->n_tensors - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (job->tensors[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return &job->tensors[low];
}

/* Where the first bad row is; `rows` are known to hold one. */
static int fail_bad_row(struct job *job, const struct tensor *t, int type, const char *data,
                        size_t row_size, int64_t first_row, int64_t rows, const char *what) {
    int64_t row = 0;
    while (row < rows - 1 && job->ggml.validate_row_data(type, data + (size_t)row * row_size, row_size)) {
        row++;
    }
    struct where where = {t->name, first_row + row, 0, 0};
    return fail(job, FAIL_DATA, where, "%s", what);
}

static int do_block(struct job *job, int64_t block, struct buffers *b) {
    const struct tensor *t = tensor_of_block(job, block);
    int64_t per_matrix = (t->matrix_rows - 1) / t->block_rows + 1;
    int64_t index = block - t->first_block, matrix = index / per_matrix;
    int64_t start = (index % per_matrix) * t->block_rows;
    int64_t rows = t->matrix_rows - start < t->block_rows ? t->matrix_rows - start : t->block_rows;
    int64_t first = matrix * t->matrix_rows + start, n = rows * t->row_length;
    size_t from_size = (size_t)rows * t->from_row, to_size = (size_t)rows * t->to_row;
    const struct source *source = &job->sources[t->source];
    const char *result = b->from;

    if (read_whole(job, FAIL_SOURCE, source->fd, source->path, b->from, from_size,
                   t->from + first * (int64_t)t->from_row)) {
        return -1;
    }
    if (!job->ggml.validate_row_data(t->from_type, b->from, from_size)) {
        return fail_bad_row(job, t, t->from_type, b->from, t->from_row, first, rows,
                            "NaN or Inf in the source weights");
    }
    if (t->from_type != t->to_type) {
        const float *values = b->values;
        if (t->from_type == TYPE_F32) {
            values = (const float *)(const void *)b->from;
        } else if (t->from_type == TYPE_F16) {
            job->ggml.fp16_to_fp32_row(b->from, b->values, n);
        } else if (t->from_type == TYPE_BF16) {
            job->ggml.bf16_to_fp32_row(b->from, b->values, n);
        } else {
            job->ggml.get_type_traits(t->from_type)->to_float(b->from, b->values, n);
        }
        const float *importance =
            t->imatrix < 0 ? NULL : job->imatrix + t->imatrix + matrix * t->row_length;
        size_t size =
            job->ggml.quantize_chunk(t->to_type, values, b->to, 0, rows, t->row_length, importance);
        if (size != to_size) {
            return fail(job, FAIL_GGML, in_tensor(t), "ggml wrote %zu bytes, expected %zu", size,
                        to_size);
        }
        if (t->moments >= 0) {
            round_rows(t->to_type, (uint8_t *)b->to, t->to_row, values, rows, t->row_length,
                       job->moments[t->moments].values, job->ggml.half, b->rounding);
        }
        if (!job->ggml.validate_row_data(t->to_type, b->to, to_size)) {
            return fail_bad_row(job, t, t->to_type, b->to, t->to_row, first, rows,
                                "the quantised weights hold NaN or Inf");
        }
        result = b->to;
    }
    if (write_whole(job, result, to_size, t->to + first * (int64_t)t->to_row)) {
        return -1;
    }
    atomic_fetch_add(&job->done_bytes, (long long)to_size);
    return 0;
}

static void *work(void *argument) {
    struct job *job = argument;
    size_t from = 1, to = 1, values = 1, rounding = 1;
    for (int i = 0; i < job->n_tensors; i++) {
        const struct tensor *t = &job->tensors[i];
        size_t rows = (size_t)t->block_rows;
        from = rows * t->from_row > from ? rows * t->from_row : from;
        to = rows * t->to_row > to ? rows * t->to_row : to;
        values = rows * (size_t)t->row_length > values ? rows * (size_t)t->row_length : values;
        size_t scratch = t->moments < 0 ? 0 : rounding_scratch_bytes(t->row_length);
        rounding = scratch > rounding ? scratch : rounding;
    }
    struct buffers b = {malloc(from), malloc(to), malloc(values * sizeof(float)), malloc(rounding)};
    if (!b.from || !b.to || !b.values || !b.rounding) {
        fail_memory(job, "a block of rows");
    }
    while (!atomic_load(&job->stop)) {
        long long block = atomic_fetch_add(&job->next_block, 1);
        if (block >= job->n_blocks) {
            break;
        }
        do_block(job, block, &b);
    }
    free(b.from);
    free(b.to);
    free(b.values);
    free(b.rounding);
    atomic_fetch_sub(&job->active, 1);
    return NULL;
}

static void print_progress(struct job *job) {
    char name[256] = "";
    long long block = atomic_load(&job->next_block);
    if (job->n_tensors && block < job->n_blocks) {
        json_escape(name, sizeof name, tensor_of_block(job, block)->name);
    }
    printf("{\"event\":\"progress\",\"done_bytes\":%lld,\"total_bytes\":%" PRId64
           ",\"tensor\":\"%s\"}\n",
           (long long)atomic_load(&job->done_bytes), job->total_bytes, name);
    fflush(stdout);
}

static int run_workers(struct job *job) {
    pthread_t threads[MAX_THREADS];
    int n = 0;
    for (; n < job->threads; n++) {
        atomic_fetch_add(&job->active, 1);
        if (pthread_create(&threads[n], NULL, work, job)) {
            atomic_fetch_sub(&job->active, 1);
            if (!n) {
                return fail_memory(job, "a thread");
            }
            break; /* fewer threads do the same work */
        }
    }
    const struct timespec moment = {0, POLL_NANOSECONDS};
    for (int polls = 1; atomic_load(&job->active); polls++) {
        nanosleep(&moment, NULL);
        if (g_signalled) {
            fail(job, FAIL_INTERRUPTED, NOWHERE, "interrupted");
        }
        if (polls % POLLS_PER_PROGRESS == 0) {
            print_progress(job);
        }
    }
    for (int i = 0; i < n; i++) {
        pthread_join(threads[i], NULL);
    }
    return job->failure ? -1 : 0;
}

/* ------------------------------------------------------------------------------------------ */

static int build_output(struct job *job, const char *path) {
    int64_t at = 0;
    if (parse_job(job, path) || open_ggml(job) || open_files(job) || start_output(job, &at)) {
        return -1;
    }
    for (int i = 0; i < job->n_tensors; i++) {
        if (check_tensor(job, &job->tensors[i], &at)) {
            return -1;
        }
    }
    if (at != job->size) {
        return fail(job, FAIL_JOB, NOWHERE, "the tensors end at %" PRId64 ", not at %" PRId64, at,
                    job->size);
    }
    return run_workers(job) ? -1 : finish_output(job);
}

static void free_job(struct job *job) {
    if (job->output_fd >= 0) {
        close(job->output_fd);
    }
    if (job->temp_is_ours) {
        unlink(job->temp_path);
    }
    for (int i = 0; i < job->n_sources; i++) {
        if (job->sources[i].fd >= 0) {
            close(job->sources[i].fd);
        }
        free(job->sources[i].path);
    }
    for (int i = 0; i < job->n_moments; i++) {
        struct moments *m = &job->moments[i];
        if (m->values) {
            munmap((void *)m->values, (size_t)m->length * (size_t)m->length * sizeof(float));
        }
        free(m->path);
    }
    for (int i = 0; i < job->n_tensors; i++) {
        free(job->tensors[i].name);
    }
    free(job->sources);
    free(job->moments);
    free(job->tensors);
    free(job->imatrix);
    free(job->ggml_path);
    free(job->header_path);
    free(job->imatrix_path);
    free(job->temp_path);
    pthread_mutex_destroy(&job->failure_lock);
}

/* Most memory that this process has held. Linux counts ru_maxrss from before exec, so its parent's
 * memory would be in it; the high-water mark in /proc belongs to this program alone. */
static int64_t peak_rss_bytes(void) {
    struct rusage usage;
#ifdef __linux__
    char line[256];
    long long kibibytes = -1;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && kibibytes < 0 && fgets(line, sizeof line, status)) {
        sscanf(line, "VmHWM: %lld kB", &kibibytes);
    }
    if (status) {
        fclose(status);
    }
    if (kibibytes >= 0) {
        return (int64_t)kibibytes * 1024;
    }
#endif
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (int64_t)usage.ru_maxrss; /* bytes */
#else
    return (int64_t)usage.ru_maxrss * 1024; /* KiB */
#endif
}

/* Run the job table at `path`, report on stdout, and return the exit status. */
static int run_job(const char *path) {
    struct job job;
    memset(&job, 0, sizeof job);
    job.output_fd = -1;
    pthread_mutex_init(&job.failure_lock, NULL);
    int status = build_output(&job, path) ? job.failure : 0;
    if (status) {
        printf("{\"event\":\"error\",\"code\":%d,%s}\n", status, job.failure_text);
    } else {
        int64_t peak = peak_rss_bytes();
        printf("{\"event\":\"done\",\"size_bytes\":%" PRId64 ",\"peak_rss_bytes\":%" PRId64 "}\n",
               job.size, peak);
    }
    fflush(stdout);
    free_job(&job);
    return status;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: apreqel-quantize JOB\n");
        return 2;
    }
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* nobody waits for the file if apreqel is gone */
#endif
    struct sigaction action = {0};
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    return run_job(argv[1]);
}
