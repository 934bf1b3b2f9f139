package transport

import (
	"context"
	"time"
)

// doneContext turns a channel and a deadline into a context, for the rare paths that need one.
func doneContext(done <-chan struct{}, deadline time.Time) (context.Context, context.CancelFunc) {
	var (
		ctx    context.Context
		cancel context.CancelFunc
	)
	if deadline.IsZero() {
		ctx, cancel = context.WithCancel(context.Background())
	} else {
		ctx, cancel = context.WithDeadline(context.Background(), deadline)
	}
	go func() {
		select {
		case <-done: // blocks for ever when nil
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}
