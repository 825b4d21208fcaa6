//! The state database's twin in memory: the part of blockferry's `store` that its rows need.

#[path = "../../src/store/state.rs"]
mod state;
#[path = "../../src/store/state_memory.rs"]
mod state_memory;
#[path = "../../src/store/written.rs"]
mod written;

pub use state::{State, StateBatch, StateChange, StateEntry, StateError};
pub use state_memory::MemoryState;
pub use written::boot_id;
