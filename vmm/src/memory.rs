//! Guest memory: the layout of RAM around the MMIO gap, and the mappings behind it.

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

/// Guest RAM as devices see it: shared, cheap to clone, every access checked.
pub type GuestRam = Arc<GuestMemoryMmap>;
