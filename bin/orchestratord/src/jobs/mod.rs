//! Operations on jobs, without HTTP: submit, follow, view, explain, cancel and end.

mod end;
mod explain;
mod follow;
mod log;
mod stream_log;
mod submit;
mod view;

pub use end::{JobEnd, UnrecordableJob, cancel, drop_unrecordable, end};
pub use explain::explain;
pub use follow::{Feed, FollowError, follow};
pub use log::JobLog;
pub use submit::{Accepted, SubmitError, submit, unsupported};
pub use view::view;
