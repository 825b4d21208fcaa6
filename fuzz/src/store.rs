//! The state database's twin in memory: the part of blockferry's `store` that its rows need.

#[path = "../../src/store/state.rs"]
mod state;
#[path = "../../src/store/state_memory.rs"]
mod state_memory;

pub use state::{State, StateBatch, StateChange, StateEntry, StateError};
pub use state_memory::MemoryState;
