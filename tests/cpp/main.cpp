#include "check.h"

// Runs every test, or those whose name contains the first argument.
int main(int argc, char** argv) { return check::run_all(argc > 1 ? argv[1] : nullptr); }
