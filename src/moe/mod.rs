//! The mixture itself: routing as a value, the routers that make it, the layer that runs it, and what it costs.

pub mod calibration;
pub mod cost;
mod layer;
pub mod loss;
pub mod router;
mod routing;

pub use layer::{MoeLayer, SharedExpert, TokenSignals};
pub use router::{Policy, RouteCtx, StepTrace};
pub use routing::{Routing, RoutingBuilder, RoutingError};
