//! Waiting for a GPU: the one place where this crate stops until something is done.
//!
//! On a machine a thread stops, and polls the driver. In a browser nothing may stop: there, the whole call is suspended,
//! and goes on when the browser's promise is kept. That takes a browser with JavaScript Promise Integration, and a call
//! that JavaScript knows to be suspendable (`#[wasm_bindgen(jspi)]`); without, devices are not opened.

use std::sync::mpsc::Receiver;

pub(crate) use platform::{block_on, poll, receive};

#[cfg(not(target_arch = "wasm32"))]
mod platform {
    use super::Receiver;

    /// Waits for what wgpu makes without being polled.
    pub fn block_on<F: Future>(future: F) -> F::Output {
        pollster::block_on(future)
    }

    /// Waits for submissions.
    pub fn poll(
        device: &wgpu::Device,
        _queue: &wgpu::Queue,
        until: wgpu::PollType,
    ) -> Result<(), wgpu::PollError> {
        device.poll(until).map(drop)
    }

    /// What a callback sent that [`poll`] waited for; `None` if none will.
    pub fn receive<T>(from: &Receiver<T>) -> Option<T> {
        from.recv().ok()
    }
}

#[cfg(target_arch = "wasm32")]
mod platform {
    use std::cell::Cell;
    use std::rc::Rc;

    use futures_channel::oneshot;
    use js_sys::futures::future_to_promise;
    use wasm_bindgen::JsValue;

    use super::Receiver;

    /// Suspends the call until a future is ready.
    pub fn block_on<F: Future + 'static>(future: F) -> F::Output {
        let output = Rc::new(Cell::new(None));
        let put = output.clone();
        suspend(async move { put.set(Some(future.await)) });
        output.take().expect("the promise was kept after the future had been ready")
    }

    /// Suspends the call until everything is done that was submitted: a browser tells no submissions apart. Buffers whose
    /// mapping was asked for before are mapped then, for the queue keeps its promises in their order.
    pub fn poll(
        _device: &wgpu::Device,
        queue: &wgpu::Queue,
        _until: wgpu::PollType,
    ) -> Result<(), wgpu::PollError> {
        let (send, done) = oneshot::channel();
        queue.on_submitted_work_done(move || {
            let _ = send.send(());
        });
        // A callback that is dropped uncalled ends the waiting as well.
        suspend(async {
            let _ = done.await;
        });
        Ok(())
    }

    /// What a callback sent before [`poll`] came back.
    pub fn receive<T>(from: &Receiver<T>) -> Option<T> {
        from.try_recv().ok()
    }

    fn suspend(future: impl Future<Output = ()> + 'static) {
        let promise = future_to_promise(async {
            future.await;
            Ok(JsValue::UNDEFINED)
        });
        #[expect(deprecated, reason = "it is experimental, and there is no other way")]
        let kept = js_sys::futures::jspi_block_on_promise(&promise);
        // The future has no way to fail.
        debug_assert!(kept.is_ok());
    }
}
