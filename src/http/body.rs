//! A response body that is watched on its way out.

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use http_body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Is told what becomes of a body, and dropped with it.
pub(super) trait Watch: Send + Unpin + 'static {
    /// So many bytes were handed to the connection.
    fn data(&mut self, _bytes: usize) {}
    /// Nothing more will come: the body is whole, or it has failed.
    fn end(&mut self, _result: Result<(), &axum::Error>) {}
}

struct Watched<W> {
    body: Body,
    watch: W,
}

/// Puts `watch` on the body of `response`.
pub(super) fn watched(response: Response, mut watch: impl Watch) -> Response {
    // A connection does not poll a body that it knows to be empty.
    if response.body().is_end_stream() {
        watch.end(Ok(()));
    }
    response.map(|body| Body::new(Watched { body, watch }))
}

impl<W: Watch> HttpBody for Watched<W> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.watch.data(frame.data_ref().map_or(0, Bytes::len));
                // A connection that sees the end does not poll again.
                if self.body.is_end_stream() {
                    self.watch.end(Ok(()));
                }
            }
            Poll::Ready(Some(Err(error))) => self.watch.end(Err(error)),
            Poll::Ready(None) => self.watch.end(Ok(())),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
