"""llama.cpp, through the libraries that llama-cpp-python installs."""
