//! A panic in a task would pass unnoticed: this notes it, for the thread that it happened on. Must not know tasks.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Begins anew on this thread.
pub fn forget() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            LAST.with(|last| *last.borrow_mut() = Some(info.to_string()));
            before(info);
        }));
    });
    LAST.with(|last| *last.borrow_mut() = None);
}

/// The last panic on this thread since.
pub fn last() -> Option<String> {
    LAST.with(|last| last.borrow().clone())
}
