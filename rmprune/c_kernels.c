/* What nets are made of, in C99; rmprune.c_source takes the functions that a net needs.
 * Tensors are NCHW with N = 1. */

//: conv_f32
/* A convolution; rows are summed up in one go, which compilers vectorise. */
static void conv_f32(const float *x, const float *w, const float *b, float *y, const conv_t *p,
                     float lo, float hi)
{
    const int inputs = p->in_channels / p->groups, outputs = p->out_channels / p->groups;
    for (int o = 0; o < p->out_channels; ++o) {
        const float *from = x + (size_t)(o / outputs) * inputs * p->in_height * p->in_width;
        for (int i = 0; i < p->out_height; ++i) {
            float *row = y + ((size_t)o * p->out_height + i) * p->out_width;
            for (int j = 0; j < p->out_width; ++j)
                row[j] = b[o];
            for (int c = 0; c < inputs; ++c)
                for (int u = 0; u < p->kernel_height; ++u) {
                    const int v = i * p->stride_height - p->pad_top + u * p->dilation_height;
                    if (v < 0 || v >= p->in_height)
                        continue;
                    const float *line = from + ((size_t)c * p->in_height + v) * p->in_width;
                    const float *taps = w + (((size_t)o * inputs + c) * p->kernel_height + u)
                                            * p->kernel_width;
                    for (int k = 0; k < p->kernel_width; ++k) {
                        const int shift = k * p->dilation_width - p->pad_left;
                        const int begin = first(shift, p->stride_width);
                        const int end = last(shift, p->stride_width, p->in_width, p->out_width);
                        for (int j = begin; j < end; ++j)
                            row[j] += taps[k] * line[j * p->stride_width + shift];
                    }
                }
            for (int j = 0; j < p->out_width; ++j)
                row[j] = row[j] < lo ? lo : row[j] > hi ? hi : row[j];
        }
    }
}

//: conv_sum
/* One row of one output channel of an int8 convolution, summed up in 32 bits. */
static void conv_sum(const int8_t *x, const int8_t *w, int32_t *row, const conv_t *p, int zero,
                     int o, int i)
{
    const int inputs = p->in_channels / p->groups, outputs = p->out_channels / p->groups;
    const int8_t *from = x + (size_t)(o / outputs) * inputs * p->in_height * p->in_width;
    for (int c = 0; c < inputs; ++c)
        for (int u = 0; u < p->kernel_height; ++u) {
            const int v = i * p->stride_height - p->pad_top + u * p->dilation_height;
            if (v < 0 || v >= p->in_height)
                continue;
            const int8_t *line = from + ((size_t)c * p->in_height + v) * p->in_width;
            const int8_t *taps = w + (((size_t)o * inputs + c) * p->kernel_height + u)
                                     * p->kernel_width;
            for (int k = 0; k < p->kernel_width; ++k) {
                const int shift = k * p->dilation_width - p->pad_left;
                const int begin = first(shift, p->stride_width);
                const int end = last(shift, p->stride_width, p->in_width, p->out_width);
                for (int j = begin; j < end; ++j)
                    row[j] += taps[k] * (line[j * p->stride_width + shift] - zero);
            }
        }
}

//: conv_i8
/* An int8 convolution: 32-bit sums times one float for each output channel. */
static void conv_i8(const int8_t *x, const int8_t *w, const int32_t *b, const float *scale,
                    int8_t *y, int32_t *row, const conv_t *p, int zero, int out_zero, float lo,
                    float hi)
{
    for (int o = 0; o < p->out_channels; ++o)
        for (int i = 0; i < p->out_height; ++i) {
            for (int j = 0; j < p->out_width; ++j)
                row[j] = b[o];
            conv_sum(x, w, row, p, zero, o, i);
            int8_t *to = y + ((size_t)o * p->out_height + i) * p->out_width;
            for (int j = 0; j < p->out_width; ++j) {
                float value = (float)row[j] * scale[o];
                value = value < lo ? lo : value > hi ? hi : value;
                to[j] = to_i8(value, out_zero);
            }
        }
}

//: conv_i8_f32
/* An int8 convolution that gives floats. */
static void conv_i8_f32(const int8_t *x, const int8_t *w, const int32_t *b, const float *scale,
                        float *y, int32_t *row, const conv_t *p, int zero, float lo, float hi)
{
    for (int o = 0; o < p->out_channels; ++o)
        for (int i = 0; i < p->out_height; ++i) {
            for (int j = 0; j < p->out_width; ++j)
                row[j] = b[o];
            conv_sum(x, w, row, p, zero, o, i);
            float *to = y + ((size_t)o * p->out_height + i) * p->out_width;
            for (int j = 0; j < p->out_width; ++j) {
                const float value = (float)row[j] * scale[o];
                to[j] = value < lo ? lo : value > hi ? hi : value;
            }
        }
}

//: conv_t
typedef struct {
    int in_channels, in_height, in_width, out_channels, out_height, out_width;
    int kernel_height, kernel_width, stride_height, stride_width, pad_top, pad_left;
    int dilation_height, dilation_width, groups;
} conv_t;

/* The first output whose input j * stride + shift is not left of the row. */
static int first(int shift, int stride)
{
    return shift < 0 ? (-shift + stride - 1) / stride : 0;
}

/* Behind the last output whose input is not right of the row. */
static int last(int shift, int stride, int in_width, int out_width)
{
    const int end = in_width - shift <= 0 ? 0 : (in_width - shift - 1) / stride + 1;
    return end < out_width ? end : out_width;
}

//: to_i8
/* The nearest of int8, halves to even. */
static int8_t to_i8(float value, int zero)
{
    const float q = nearbyintf(value) + (float)zero;
    return (int8_t)(q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q);
}
