//! From a running attempt to its readers: a [`Hub`] for each job that is not over, and the readers' side of it.

mod hub;
mod reader;

pub use hub::{Hub, Read};
pub use reader::follow;
