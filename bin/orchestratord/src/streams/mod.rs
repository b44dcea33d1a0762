//! From a running attempt to its readers: the [`JobLog`] of each job that is not over, and the readers' side of it.

mod job_log;
mod reader;
mod stream_log;

pub use job_log::JobLog;
pub use reader::follow;
pub use stream_log::Read;
