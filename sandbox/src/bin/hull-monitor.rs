//! The process that holds one VM. `hull` starts it; see `hull_sandbox::monitor`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_sandbox::monitor::main()
}
