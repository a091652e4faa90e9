//! From a case of the table to the command of an engine.
//!
//! Owns: [`HullAdapter`] and the control, [`CrunAdapter`]. Refuses: to judge what comes of it.

mod crun;
mod hull;

use std::path::Path;

pub use crun::CrunAdapter;
pub use hull::HullAdapter;

use crate::cases::Case;
use crate::process::Process;

/// An engine that runs cases.
pub trait Adapter {
    /// Whether it is the control, of which not every case can hold.
    fn is_control(&self) -> bool;

    /// The engine's command for a case whose files are in `scratch`.
    fn process(&self, case: &Case, scratch: &Path) -> Process;
}
