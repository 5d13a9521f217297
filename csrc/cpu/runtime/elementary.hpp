// Exponential functions and sines in double from single additions, multiplications and divisions: a C library's may differ
// from one system to the next in the last bit, and these may not.
#pragma once

namespace paceline::elementary {

double exp(double x);            // of x from -700 to 700, of the nearer of these outside, and of -700 for NaN
double pow(double x, double y);  // for x > 0, where the result is a normal number
double cos(double x);            // for |x| < 2^30, to about 1e-16
double sin(double x);

}  // namespace paceline::elementary
